"""The generation job: check everything, lock it, have the missing shards made, tell of it.

Owns the order of events of one run. What a worker does is in `worker`, what is made in `spec`, how
workers are run in `worker.pool`.
"""

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rayjobs import cluster, storage
from rayjobs.config import JobFailed
from rayjobs.dataset.lock import Lock, Segment
from rayjobs.dataset.manifest import GROUP, Manifest
from rayjobs.generation.config import GenerateConfig
from rayjobs.generation.spec import determinism
from rayjobs.generation.spec.draft import check
from rayjobs.generation.spec.lock import config_of, open_spec, record_schema
from rayjobs.generation.spec.segments import enter
from rayjobs.models import exports
from rayjobs.quality import duplicates
from rayjobs.reports import card, dataset_report

FEW = 100_000
"""Records: of so many the near-duplicates are looked for at the end of each run."""
Redo = Mapping[int, Mapping[int, int]]


@dataclass(frozen=True)
class Summary:
    """What a run did, and how many failed records the data set has now."""

    num_records: int
    num_made: int
    num_failed: int
    seconds: float
    output_uri: str


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
    with check(config) as draft:
        return enter(draft, lambda: determinism.current(config), extend)


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
    config = anywhere(config)
    with ExitStack() as stack:
        lock = _enter(config, extend, stack)
        manifest = Manifest(config.output.uri, lock.format)
        manifest.recover()
        manifest.compact()
        work = _again(lock, manifest) if retry_failed else _missing(lock, manifest, limit)
        if work:
            stack.enter_context(_session(config))
        made = 0
        try:
            for part in work:
                made += _make(config, lock, manifest, part)
        except (KeyboardInterrupt, JobFailed):
            # These workers did not die of what they were making.
            stack.close()
            storage.remove_folder(storage.join(config.output.uri, "attempts"))
            raise
    return _finish(config, lock, manifest, made, started)


def _session(config: GenerateConfig) -> AbstractContextManager[None]:
    from rayjobs.generation.worker import pool

    return pool.session(config)


def make_again(config: GenerateConfig, lock: Lock, redo: Redo) -> int:
    """Make records of finished shards again: `redo` maps shards to records and their seeds."""
    config = anywhere(config)
    from rayjobs.generation.worker import pool

    manifest, made = Manifest(config.output.uri, lock.format), 0
    with pool.session(config):
        for number, segment in enumerate(lock.segments):
            mine = {shard: seeds for shard, seeds in redo.items() if shard in segment.shards}
            if mine:
                num_images = sum(len(seeds) for seeds in mine.values())
                work = _Work(number, np.array(sorted(mine)), mine, num_images)
                made += _make(config, lock, manifest, work)
    return made


def measure_rate(config: GenerateConfig) -> float:
    """Images per second of one worker, measured where a worker would run."""
    config = anywhere(config)
    from rayjobs.generation.worker import pool, probe

    if cluster.is_own():
        return probe.rate(config)
    with pool.session(config):
        return pool.ask(config, probe.rate)


def write_moments(config: GenerateConfig) -> int:
    """Have the pictures' latents and the prompts' embeddings written where workers run."""
    config = anywhere(config)
    from rayjobs.generation.worker import moments, pool

    with pool.session(config):
        return pool.ask(config, moments.write)


def _enter(config: GenerateConfig, extend: bool, stack: ExitStack) -> Lock:
    with check(config) as draft:
        from rayjobs.generation.worker import pool  # takes seconds, and bad input is told before

        if cluster.is_own():
            lock = enter(draft, lambda: determinism.current(config), extend)
            allowed = config.engine.allow_class_change
            determinism.check_same(lock.determinism, determinism.current(config), allowed)
            return lock
        stack.enter_context(pool.session(config))
        return enter(draft, lambda: pool.ask(config, determinism.current), extend)


def _make(config: GenerateConfig, lock: Lock, manifest: Manifest, work: _Work) -> int:
    """Have it made; gathers entries a thousand at a time on the way. Returns the images made."""
    from rayjobs.generation.worker import pool

    segment = lock.segments[work.segment]
    mine = anywhere(config_of(segment, config.output.uri, config))
    done = manifest.committed(lock.num_shards)
    made = 0
    for entry in pool.make(mine, lock, work.segment, work.shards, work.redo, work.num_images):
        made += entry["rows"]
        done[entry["shard"]] = True
        group = entry["shard"] // GROUP
        if work.redo is None and done[group * GROUP : (group + 1) * GROUP].sum() == GROUP:
            manifest.compact([group])
    return made if work.redo is None else work.num_images


def _missing(lock: Lock, manifest: Manifest, limit: int | None) -> list[_Work]:
    done = manifest.committed(lock.num_shards)
    found = []
    for number, segment in enumerate(lock.segments):
        size = segment.job["output"]["images_per_shard"]
        shards = np.arange(segment.first_shard, segment.shards.stop)
        if limit is not None:
            shards = shards[: -(-max(0, limit - segment.first_record) // size)]
        shards = shards[~done[shards]]
        if len(shards):
            found.append(_Work(number, shards, None, _num_images(segment, shards, size)))
    return found


def _num_images(segment: Segment, shards: np.ndarray, size: int) -> int:
    short = segment.num_shards * size - segment.num_records
    return len(shards) * size - (short if shards[-1] == segment.shards.stop - 1 else 0)


def _again(lock: Lock, manifest: Manifest) -> list[_Work]:
    """Finished shards with failed records."""
    failed = {e["shard"]: e["failed"] for e in manifest.entries() if e["failed"]}
    found = []
    for number, segment in enumerate(lock.segments):
        mine = [shard for shard in failed if shard in segment.shards]
        if mine:
            num_images = sum(failed[shard] for shard in mine)
            found.append(_Work(number, np.array(mine), {}, num_images))
    return found


def _finish(
    config: GenerateConfig, lock: Lock, manifest: Manifest, made: int, started: float
) -> Summary:
    uri = config.output.uri
    failed = sum(entry["failed"] for entry in manifest.entries())
    spec = open_spec(config, lock.segments[-1], len(lock.segments) - 1)
    card.write(config.output.uri, config.model.uri, lock, record_schema(config, spec.rows))
    if lock.num_records <= FEW:  # of a larger one `rayjobs report` makes it, when asked to
        duplicates.write(uri)
    dataset_report.write(uri)
    if manifest.committed(lock.num_shards).all():
        manifest.clean()
    return Summary(lock.num_records, made, failed, time.monotonic() - started, uri)


def anywhere(config: GenerateConfig) -> GenerateConfig:
    """The job as a worker in any working directory can read it: with absolute local paths."""
    config = config.model_copy(update={"model": exports.resolve(config.model)})
    values = config.model_dump()
    places = [(values["output"], "uri"), (values["prompts"], "uri"), (values["init"], "uri")]
    places += [(part, "uri") for key in ("loras", "words") for part in values["model"][key]]
    if Path(config.model.uri).exists():
        places.append((values["model"], "uri"))
    for part, key in places:
        if part[key] is not None:
            part[key] = storage.absolute(part[key])
    return GenerateConfig.model_validate(values)
