"""A worker: makes whole shards and commits them.

Owns the way from shard numbers to committed shards inside one process. Which records crash workers
`attempts` tells. A plain class: `pool` wraps it for Ray, tests call it.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from rayjobs import storage
from rayjobs.config import BadInput
from rayjobs.dataset.lock import Lock, read_lock
from rayjobs.dataset.manifest import Entry, Manifest
from rayjobs.dataset.records import Row
from rayjobs.generation.config import GenerateConfig
from rayjobs.generation.spec import determinism
from rayjobs.generation.spec.lock import open_spec, record_of, record_schema
from rayjobs.generation.spec.records import Record, Redo
from rayjobs.generation.worker.attempts import Attempt, Attempts
from rayjobs.generation.worker.generator import RecordGenerator
from rayjobs.telemetry.meters import Meters, Totals

MAX_UNSAVED_SHARDS = 2
"""Finished shards that may wait to be stored: more would fill the memory when storage is slow."""
CRASHES_WORKER = "it ends the worker process that makes it"
"""The error of such a record."""


@dataclass(eq=False)
class _OpenShard:
    """A shard whose records are being made, with the rows that it has so far.

    `old` is the entry that it replaces.
    """

    number: int
    numbers: range
    old: Entry | None = None
    rows: dict[int, Row] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    @property
    def missing(self) -> list[int]:
        return [number for number in self.numbers if number not in self.rows]


class ShardWorker:
    """Holds the model and makes shards of one segment of a data set.

    `report(images, failed)` is called for every finished image. `redo` maps finished shards to the
    records to make again, with the seeds to use, None for their own; without any record, those that
    failed. `attempts` tells which earlier deaths of workers count.
    """

    def __init__(
        self,
        config: GenerateConfig,
        lock: Lock,
        segment: int = 0,
        *,
        redo: Redo | None = None,
        report: Callable[[int, int], None] = lambda images, failed: None,
        attempts: Attempts | None = None,
    ):
        determinism.pin(config.workers)
        mine = determinism.current(config)
        allowed = config.engine.allow_class_change
        changed = not determinism.check_same(lock.determinism, mine, allowed)
        self.name = f"{os.uname().nodename}-{os.getpid()}"
        self.facts = {"class": determinism.identify(mine), "class_changed": changed}
        self.config = config
        self.segment = lock.segments[segment]
        self._lock: Lock | None = lock
        self.spec = open_spec(config, self.segment, segment)
        self.schema = record_schema(config, self.spec.rows)
        self.manifest = Manifest(config.output.uri, lock.format)
        self.attempts = attempts or Attempts(config.output.uri)
        self.generator = RecordGenerator(config, self.segment.model_name, self.segment.guided)
        self._check_model()
        self._redo = redo
        self._report = report
        self.takes_more: Callable[[], bool] = lambda: True
        """Whether another shard may be begun; asked before each."""
        self.count_with(Meters())
        self._began: float | None = None
        self._open: dict[int, _OpenShard] = {}
        self._commits: list[Future[Entry]] = []
        self._looking = ThreadPoolExecutor(1, thread_name_prefix="looking")
        self._saving = ThreadPoolExecutor(MAX_UNSAVED_SHARDS, thread_name_prefix="saving")

    def count_with(self, meters: Meters) -> None:
        """From now on tell these what it does."""
        self._meters, self._totals = meters, Totals(meters)

    def make(self, shards: Iterable[int]) -> Iterator[Entry]:
        """Make the shards that are not finished yet; yield the entry of each once committed.

        `made` in it says whether this worker made it, not one of another run meanwhile.
        """
        suspects: dict[int, Attempt] = {}
        self._began = self._began or time.monotonic()
        for record, row in self.generator.generate(self._records(shards, suspects)):
            self._put(self._open[self.segment.shard_of(record.number)], row)
            yield from self._committed(MAX_UNSAVED_SHARDS)
        for number, attempt in suspects.items():
            self._make_one_by_one(number, attempt)
            yield from self._committed(MAX_UNSAVED_SHARDS)
        yield from self._committed(0)

    def place(self) -> str:
        """What this worker is making, in words."""
        shards = ", ".join(map(str, list(self._open)))
        return f"shard {shards}" if shards else "shards that are being looked for or stored"

    def drop(self) -> None:
        """Leave open shards to others, as if they had not been begun."""
        for number in list(self._open):
            self.attempts.end(number)

    def record(self, number: int) -> Record:
        """Record `number` of the data set, with the seed that it is to be made again with."""
        record = record_of(self.spec, self.segment, number)
        seed = self._seeds(self.segment.shard_of(number)).get(number)
        return record if seed is None else replace(record, seed=seed)

    def _seeds(self, shard: int) -> Mapping[int, int | None]:
        return {} if self._redo is None else self._redo.get(shard, {})

    def _records(self, shards: Iterable[int], suspects: dict[int, Attempt]) -> Iterator[Record]:
        """The records of all shards, one after the other without a gap.

        A shard that crashed too many workers is put into `suspects` instead.
        """
        for number, entry, last in self._looked_up(shards):
            if not self.takes_more():
                return
            if entry is not None:
                self._commits.append(_completed(entry))
                continue
            attempt = self.attempts.begin(number, last)
            self._meters.add("restarts", attempt.number > 1)
            self._check_lock()
            if attempt.number > self.config.workers.attempts:
                suspects[number] = attempt
            else:
                yield from map(self.record, self._begin(number).missing)

    def _looked_up(
        self, shards: Iterable[int]
    ) -> Iterator[tuple[int, Entry | None, Attempt | None]]:
        """Shards, each with its entry if it is finished, else with the last attempt at it.

        Storage is asked while the shard before is made: the engine does not wait for answers.
        """
        ahead: deque[tuple[int, Future[tuple[Entry | None, Attempt | None]]]] = deque()
        for number in shards:
            ahead.append((number, self._looking.submit(self._look_up, number)))
            if len(ahead) > 1:
                before, found = ahead.popleft()
                yield before, *found.result()
        for number, found in ahead:
            yield number, *found.result()

    def _look_up(self, number: int) -> tuple[Entry | None, Attempt | None]:
        entry = self.manifest.entry(number) if self._redo is None else None
        return entry, self.attempts.last(number) if entry is None else None

    def _begin(self, number: int) -> _OpenShard:
        shard = self._open[number] = _OpenShard(number, self.segment.records_of(number))
        if self._redo is not None:
            self._keep_rows(shard)
        return shard

    def _keep_rows(self, shard: _OpenShard) -> None:
        """The rows of a finished shard that are not to be made again."""
        shard.old = self.manifest.entry(shard.number)
        again = set(self._seeds(shard.number))
        if again >= set(shard.numbers):
            return
        read = self.manifest.format.read(self.manifest.data, shard.number, schema=self.schema)
        rows = {row["record"]: row for row in read}
        again = again or {number for number, row in rows.items() if row["status"] != "ok"}
        shard.rows = {number: row for number, row in rows.items() if number not in again}
        if not shard.missing:  # mended before an earlier worker died
            self._close(shard, _completed(shard.old))
            self.attempts.end(shard.number)

    def _make_one_by_one(self, number: int, attempt: Attempt) -> None:
        """One record at a time, each noted before it is made; likely culprits come first."""
        shard = self._begin(number)
        for record in set(attempt.culprits).intersection(shard.missing):
            self._put(shard, self._failed_row(record))
        for record in sorted(shard.missing, key=lambda r: -attempt.deaths.get(r, 0)):
            self.attempts.begin_record(number, attempt, record)
            for _, row in self.generator.generate([self.record(record)]):
                self._put(shard, row)

    def _put(self, shard: _OpenShard, row: Row) -> None:
        shard.rows[row["record"]] = row
        self._report(1, int(row["status"] != "ok"))
        self._count(row)
        if len(shard.rows) == len(shard.numbers):
            self._close(shard, self._saving.submit(self._commit, shard))

    def _count(self, row: Row) -> None:
        self._meters.add("images")
        if row["status"] != "ok":
            self._meters.add("failed_images", reason=row["error"] or "no reason was given")
        engine, waited_s = self.generator.engine, 0.0
        if self._began is not None:
            waited_s = time.monotonic() - self._began - engine.step_s
        self._totals.tell(
            steps=engine.num_steps,
            step_seconds=engine.step_s,
            unet_seconds=engine.step_s - engine.side_s,
            side_seconds=engine.side_s,
            waiting_seconds=waited_s,
            storage_retries=storage.num_retries(),
        )

    def _close(self, shard: _OpenShard, entry: Future[Entry]) -> None:
        del self._open[shard.number]
        self._commits.append(entry)

    def _failed_row(self, record: int) -> Row:
        row = self.generator.columns(self.record(record))
        return row | {"status": "failed", "error": CRASHES_WORKER}

    def _commit(self, shard: _OpenShard) -> Entry:
        started = time.monotonic()
        rows = [shard.rows[number] for number in shard.numbers]
        files = self.manifest.format.encode(shard.number, rows, self.schema)
        facts = {
            "rows": len(rows),
            "failed": sum(row["status"] != "ok" for row in rows),
            "seconds": round(time.monotonic() - shard.started, 3),
            "finished_at": round(time.time(), 3),
            "worker": self.name,
            "node": os.uname().nodename,
            **self.facts,
        }
        if shard.old is not None:
            entry = self.manifest.replace(shard.old, files, facts)
        else:
            entry = self.manifest.commit(shard.number, files, facts)
        self.attempts.end(shard.number)
        self._meters.add("commits")
        self._meters.add("commit_seconds", time.monotonic() - started)
        mine = ("worker", "finished_at")
        return entry | {"made": all(entry.get(key) == facts[key] for key in mine)}

    def _committed(self, max_unsaved: int) -> Iterator[Entry]:
        """Entries of stored shards; waits for some while more than `max_unsaved` are not stored."""
        while self._commits and (self._commits[0].done() or len(self._commits) > max_unsaved):
            yield self._commits.pop(0).result()

    def _check_lock(self) -> None:
        """Until a first marker is there, another job may take the place of this one."""
        if self._lock is None:
            return
        there, mine = read_lock(self.config.output.uri), self._lock
        same = there is not None and there.segments[: len(mine.segments)] == mine.segments
        if there is None or not same or there.determinism != mine.determinism:
            raise BadInput(f"another run began another job in {self.config.output.uri}; this ends")
        self._lock = None

    def _check_model(self) -> None:
        loaded, locked = self.generator.model.sha256, self.segment.model_sha256
        if loaded != locked:
            raise ValueError(
                f"model {self.config.model.uri} changed while the job ran: "
                f"{loaded[:12]} is not {locked[:12]}"
            )


def _completed(entry: Entry | None) -> Future[Entry]:
    future: Future[Entry] = Future()
    future.set_result((entry or {}) | {"made": False})
    return future
