"""The generation job: resolve and check it, lock it, have missing shards made, write the reports.

Owns the order of events of one run. What a worker does is in `worker`, what is made in `spec`, how
workers are run in `worker.pool`.
"""

import time
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass

import numpy as np

from rayjobs import cluster, storage
from rayjobs.config import BadInput, JobFailed, changed
from rayjobs.dataset.gathering import Gathering
from rayjobs.dataset.inspection import inspect, inspect_snapshots
from rayjobs.dataset.lock import Lock, read_lock
from rayjobs.dataset.manifest import Manifest
from rayjobs.generation.config import GenerateConfig
from rayjobs.generation.resolved import ResolvedConfig, resolve
from rayjobs.generation.spec import determinism
from rayjobs.generation.spec.draft import open_draft
from rayjobs.generation.spec.lock import config_again, config_of, data_set_schema
from rayjobs.generation.spec.origin import Origin
from rayjobs.generation.spec.records import Redo
from rayjobs.generation.spec.segments import ensure_segment, restore_snapshots
from rayjobs.generation.worker import here
from rayjobs.quality import duplicates, semantic
from rayjobs.reports import card, dataset_report
from rayjobs.reports.history import Activity, History
from rayjobs.reports.live import LivePage

MAX_DEDUPLICATED = 100_000
"""Records up to which near-duplicates are searched for at the end of each run."""


@dataclass(frozen=True)
class Summary:
    """What a run did, and how many failed records the data set has now."""

    num_records: int
    num_made: int
    num_failed: int
    seconds: float
    output_uri: str
    making_s: float = 0.0
    """Of the seconds, those in which workers made images."""


@dataclass(frozen=True)
class _Made:
    """Images, and the seconds in which workers made them."""

    images: int = 0
    seconds: float = 0.0

    def __add__(self, other: "_Made") -> "_Made":
        return _Made(self.images + other.images, self.seconds + other.seconds)


@dataclass(frozen=True)
class _Work:
    """Shards of one segment to make, or of finished ones the records to make again."""

    segment: int
    shards: np.ndarray
    redo: Redo | None
    num_images: int


def prepare(config: GenerateConfig, extend: bool = False) -> Lock:
    """Check all that can be checked without a worker, and write or find the data set's lock.

    A new data set gets this machine's determinism class.
    """
    config = resolve(config)
    with open_draft(config) as draft:
        lock = ensure_segment(draft, lambda: determinism.current(config), extend)
    _write_card(config, lock)
    return lock


def run(
    config: GenerateConfig,
    limit: int | None = None,
    *,
    extend: bool = False,
    retry_failed: bool = False,
) -> Summary:
    """Make what is missing of the data set; with `limit` only the shards of its first records.

    `extend` appends a changed job, `retry_failed` makes failed records again. Raises BadInput or
    StorageError before a worker starts when the job cannot be, JobFailed when it cannot go on.
    """
    started = time.monotonic()
    config = resolve(config)
    with ExitStack() as stack:
        lock = _lock(config, extend, stack)
        _check_snapshots(config.output.uri, lock)
        # Without a card, others would take the prompts' snapshot for the records.
        _write_card(config, lock)
        manifest = Manifest(config.output.uri, lock.format)
        manifest.recover()
        manifest.compact()
        work = _failed(lock, manifest) if retry_failed else _unfinished(lock, manifest, limit)
        num_images = sum(part.num_images for part in work)
        is_preview = limit is not None and cluster.is_own() and here.is_enough(config, num_images)
        made = _make_all(config, lock, manifest, work, None if is_preview else stack)
    return _finish(config, lock, manifest, made, started)


def repair(uri: str, overrides: list[str]) -> Summary:
    """Make again what is damaged of the data set at `uri`, as it was made before.

    `overrides` may change how that is done, such as workers.min. Raises BadInput when what it was
    made of is not what it was.
    """
    started = time.monotonic()
    storage.check(uri, write=True)
    lock = read_lock(uri)
    if lock is None:
        raise BadInput(f"{uri} is no data set: it has no spec.lock.json; is it an export?")
    for override in overrides:
        if not override.startswith(("workers.", "model.device=", "engine.allow_class_change=")):
            raise BadInput(f"override {override!r} would change what is made; leave it out")
    config = changed(config_again(uri, lock, -1), overrides)
    with ExitStack() as stack:
        if cluster.is_own():
            allowed = config.engine.allow_class_change
            determinism.check_same(lock.determinism, determinism.current(config), allowed)
        restore_snapshots(uri, lock, config)
        _write_card(config, lock)
        manifest = Manifest(uri, lock.format)
        manifest.recover()
        work = _damaged(lock, manifest)
        made = _make_all(config, lock, manifest, work, stack)
    return _finish(config, lock, manifest, made, started)


def _damaged(lock: Lock, manifest: Manifest) -> list[_Work]:
    """Damaged shards; files of the manifest that cannot be read are removed."""
    redo: dict[int, dict[int, int | None]] = {}
    lost: set[int] = set()
    origin = Origin(manifest.uri, lock)
    look = origin.look if origin.is_marked else None
    for _, faults in inspect(manifest, lock.num_shards, lock.records_of, origin.doubt, look):
        for fault in faults:
            if fault.manifest_file is not None:
                storage.remove(manifest.file_uri(fault.manifest_file))
                lost.update(manifest.shards_in(fault.manifest_file))
            if fault.shard is not None and (numbers := lock.records_of(fault.shard)) is not None:
                redo[fault.shard] = dict.fromkeys(numbers)
    work = _unfinished(lock, manifest, None, lost) if lost else []
    return work + _redo(lock, redo)


def _redo(lock: Lock, redo: Redo) -> list[_Work]:
    work = []
    for number, segment in enumerate(lock.segments):
        mine = {shard: seeds for shard, seeds in redo.items() if shard in segment.shards}
        if mine:
            num_images = sum(len(seeds) for seeds in mine.values())
            work.append(_Work(number, np.array(sorted(mine)), mine, num_images))
    return work


def _make_all(
    config: GenerateConfig,
    lock: Lock,
    manifest: Manifest,
    work: list[_Work],
    stack: ExitStack | None,
) -> _Made:
    """Have all of it made by workers that last as long as the stack, without one in this process.

    Meanwhile the page follows.
    """
    if work and stack is not None:
        stack.enter_context(_session(config))
    made = _Made()
    to_make = sum(part.num_images for part in work)
    try:
        with LivePage(manifest, manifest.committed(lock.num_shards), to_make):
            for part in work:
                made += _make(config, lock, manifest, part, on_ray=stack is not None)
    except (KeyboardInterrupt, JobFailed):
        # These workers did not die of what they were making.
        if stack is not None:
            stack.close()
        storage.remove_folder(storage.join(config.output.uri, "attempts"))
        raise
    return made


def _session(config: GenerateConfig) -> AbstractContextManager[None]:
    from rayjobs.generation.worker import pool

    return pool.session(config.workers)


def make_again(config: GenerateConfig, lock: Lock, redo: Redo) -> int:
    """Make records of finished shards again: `redo` maps shards to records and their seeds."""
    config = resolve(config)
    from rayjobs.generation.worker import pool

    manifest = Manifest(config.output.uri, lock.format)
    with pool.session(config.workers):
        made = sum((_make(config, lock, manifest, work) for work in _redo(lock, redo)), _Made())
    dataset_report.write(config.output.uri)
    return made.images


def measure_rate(config: GenerateConfig) -> float:
    """Images per second of one worker, measured where a worker would run."""
    config = resolve(config)
    from rayjobs.generation.worker.rate import measure_rate as measure

    if cluster.is_own():
        return measure(config)
    from rayjobs.generation.worker import pool

    with pool.session(config.workers):
        return pool.run_on_worker(config, measure)


def _lock(config: ResolvedConfig, extend: bool, stack: ExitStack) -> Lock:
    with open_draft(config) as draft:
        if cluster.is_own():
            lock = ensure_segment(draft, lambda: determinism.current(config), extend)
            allowed = config.engine.allow_class_change
            determinism.check_same(lock.determinism, determinism.current(config), allowed)
            return lock
        # Takes seconds, which bad input need not wait for.
        from rayjobs.generation.worker import pool
        from rayjobs.room import check_shared

        stack.enter_context(pool.session(config.workers))
        check_shared(config.output.uri)
        return ensure_segment(
            draft, lambda: pool.run_on_worker(config, determinism.current), extend
        )


def _make(
    config: GenerateConfig,
    lock: Lock,
    manifest: Manifest,
    work: _Work,
    on_ray: bool = True,
) -> _Made:
    """Have it made; gathers entries a thousand at a time on the way."""
    make = here.make
    if on_ray:
        from rayjobs.generation.worker import pool

        make = pool.make
    segment = lock.segments[work.segment]
    mine = config_of(segment, config.output.uri, config)
    gathering = Gathering(manifest, manifest.committed(lock.num_shards))
    made = Activity()
    for entry in make(mine, lock, work.segment, work.shards, work.redo, work.num_images):
        if entry["made"]:
            made.add(entry)
        if work.redo is None:
            gathering.add(entry)
    images = made.rows if work.redo is None else work.num_images
    return _Made(images, made.active_s)


def _unfinished(
    lock: Lock, manifest: Manifest, limit: int | None, only: set[int] | None = None
) -> list[_Work]:
    """Shards that are not finished: of the first records, or of some shards."""
    done = manifest.committed(lock.num_shards)
    work = []
    for number, segment in enumerate(lock.segments):
        shards = np.arange(segment.first_shard, segment.shards.stop)
        if limit is not None:
            wanted = max(0, limit - segment.first_record)
            shards = shards[: -(-wanted // segment.images_per_shard)]
        if only is not None:
            shards = shards[np.isin(shards, list(only))]
        shards = shards[~done[shards]]
        if len(shards):
            work.append(_Work(number, shards, None, segment.count_records(shards)))
    return work


def _failed(lock: Lock, manifest: Manifest) -> list[_Work]:
    """Finished shards with failed records."""
    failed = {e["shard"]: e["failed"] for e in manifest.entries() if e["failed"]}
    work = []
    for number, segment in enumerate(lock.segments):
        mine = [shard for shard in failed if shard in segment.shards]
        if mine:
            num_images = sum(failed[shard] for shard in mine)
            work.append(_Work(number, np.array(mine), {}, num_images))
    return work


def _check_snapshots(uri: str, lock: Lock) -> None:
    """Raise BadInput when workers would read other prompts than those of the lock."""
    for fault in inspect_snapshots(uri, lock):
        raise BadInput(f"{uri}: {fault.text}; `rayjobs repair {uri}` writes it again")


def _write_card(config: GenerateConfig, lock: Lock, history: History | None = None) -> None:
    uri = config.output.uri
    card.write(uri, config.model.uri, lock, data_set_schema(uri, lock), history)


def _finish(
    config: GenerateConfig, lock: Lock, manifest: Manifest, made: _Made, started: float
) -> Summary:
    uri = config.output.uri
    history = dataset_report.read_history(uri)
    damage = None
    try:
        if lock.num_records <= MAX_DEDUPLICATED:  # of a larger one `rayjobs report` does it
            duplicates.write(uri)
            semantic.write(uri)
    except (storage.Unavailable, BadInput):
        raise
    except dataset_report.BROKEN as error:
        damage = error
    dataset_report.write(uri, history=history)
    _write_card(config, lock, history)
    if damage is not None:
        raise BadInput(
            f"a shard is damaged: {damage}; `rayjobs verify {uri}` says what else is, and "
            f"`rayjobs repair {uri}` makes it again"
        )
    if manifest.committed(lock.num_shards).all():
        manifest.clean()
    failed, seconds = history.total("failed"), time.monotonic() - started
    return Summary(lock.num_records, made.images, failed, seconds, uri, made.seconds)
