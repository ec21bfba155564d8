"""A worker: makes whole shards and commits them.

Owns the way from shard numbers to committed shards inside one process. A plain class: `pool` wraps
it for Ray, tests call it.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from rayjobs.dataset.lock import Lock
from rayjobs.dataset.manifest import Entry, Manifest
from rayjobs.generation.config import GenerateConfig
from rayjobs.generation.spec import determinism
from rayjobs.generation.spec.lock import open_spec, record_schema
from rayjobs.generation.spec.records import Record
from rayjobs.generation.worker.attempts import Attempt, Attempts
from rayjobs.generation.worker.generator import Maker, Row
from rayjobs.generation.worker.shard import Shard

MOST_COMMITS = 2
"""Finished shards that may wait to be stored: more would fill the memory when storage is slow."""
GUILTY = "it ends the worker process that makes it"
Redo = Mapping[int, Mapping[int, int]]


@dataclass(eq=False)
class _Job:
    """A shard on its way; `old` is the entry that it replaces."""

    shard: Shard
    old: Entry | None = None
    started: float = field(default_factory=time.monotonic)


class ShardWorker:
    """Holds the model and makes shards of one segment of a data set.

    `report(images, failed)` hears of every finished image. `redo` maps shards that are finished to
    the records to make again, with the seeds to use; without any, those that failed.
    """

    def __init__(
        self,
        config: GenerateConfig,
        lock: Lock,
        segment: int = 0,
        *,
        redo: Redo | None = None,
        report: Callable[[int, int], None] = lambda images, failed: None,
    ):
        determinism.pin(config)
        mine = determinism.current(config)
        allowed = config.engine.allow_class_change
        changed = not determinism.check_same(lock.determinism, mine, allowed)
        self.facts = {"class": determinism.identify(mine), "class_changed": changed}
        self.config = config
        self.segment = lock.segments[segment]
        self.spec = open_spec(config, self.segment, segment)
        self.schema = record_schema(config, self.spec.rows)
        self.manifest = Manifest(config.output.uri, lock.format)
        self.attempts = Attempts(config.output.uri, config.workers.attempts)
        self.maker = Maker(config, self.segment.model_name, self.segment.guided)
        self._check_model()
        self._redo = redo
        self._report = report
        self._jobs: dict[int, _Job] = {}
        self._commits: list[Future[Entry]] = []
        self._saving = ThreadPoolExecutor(MOST_COMMITS, thread_name_prefix="saving")

    def make(self, shards: Iterable[int]) -> Iterator[Entry]:
        """Make the shards that are not finished yet; yield the entry of each once committed."""
        suspects: dict[int, Attempt] = {}
        for record, row in self.maker.make(self._records(shards, suspects)):
            self._put(self._job_of(record.number), row)
            yield from self._committed(MOST_COMMITS)
        for number, attempt in suspects.items():
            self._make_alone(number, attempt)
            yield from self._committed(MOST_COMMITS)
        yield from self._committed(0)

    def record(self, number: int) -> Record:
        """What record `number` of the data set asks for."""
        first = self.segment.first_record
        return replace(self.spec.record(number - first), number=number)

    def _records(self, shards: Iterable[int], suspects: dict[int, Attempt]) -> Iterator[Record]:
        """The records of all shards, one after the other without a gap.

        A shard that ended several workers is put with the `suspects` instead.
        """
        for number in shards:
            if self._redo is not None:
                yield from self._begin_again(number, self._redo.get(number, {}))
            elif self.manifest.is_committed(number):
                self._commits.append(_done(self.manifest.entry(number)))
            else:
                attempt = self.attempts.begin(number)
                if attempt.number > self.config.workers.attempts:
                    suspects[number] = attempt
                    continue
                job = self._jobs[number] = _Job(Shard(number, self._numbers(number)))
                yield from map(self.record, job.shard.numbers)

    def _make_alone(self, number: int, attempt: Attempt) -> None:
        """One record at a time, each noted before it is made; those most blamed come first."""
        job = self._jobs[number] = _Job(Shard(number, self._numbers(number)))
        for record in attempt.guilty:
            self._put(job, self._given_up(record))
        for record in sorted(job.shard.missing, key=lambda r: -attempt.deaths.get(r, 0)):
            self.attempts.alone(number, attempt, record)
            for _, row in self.maker.make([self.record(record)]):
                self._put(job, row)

    def _begin_again(self, number: int, seeds: Mapping[int, int]) -> Iterator[Record]:
        """Records of a finished shard that are to be made again; the others are kept."""
        old = self.manifest.entry(number)
        assert old is not None
        rows = list(self.manifest.format.read(self.manifest.data, number, schema=self.schema))
        again = set(seeds) or {row["record"] for row in rows if row["status"] != "ok"}
        kept = [row for row in rows if row["record"] not in again]
        self._jobs[number] = _Job(Shard(number, self._numbers(number), kept), old)
        for k in sorted(again):
            record = self.record(k)
            yield replace(record, seed=seeds.get(k, record.seed))

    def _job_of(self, record: int) -> _Job:
        size = self.config.output.images_per_shard
        return self._jobs[self.segment.first_shard + (record - self.segment.first_record) // size]

    def _numbers(self, shard: int) -> range:
        first = self.segment.first_record
        mine = self.spec.shard(shard - self.segment.first_shard)
        return range(mine.start + first, mine.stop + first)

    def _put(self, job: _Job, row: Row) -> None:
        job.shard.put(row)
        self._report(1, int(row["status"] != "ok"))
        if job.shard.is_complete:
            del self._jobs[job.shard.number]
            self._commits.append(self._saving.submit(self._commit, job))

    def _given_up(self, record: int) -> Row:
        row = self.maker.columns(self.record(record), None)
        return row | {"status": "failed", "error": GUILTY}

    def _commit(self, job: _Job) -> Entry:
        rows, number = job.shard.rows, job.shard.number
        files = self.manifest.format.encode(number, rows, self.schema)
        facts = {
            "rows": len(rows),
            "failed": sum(row["status"] != "ok" for row in rows),
            "seconds": round(time.monotonic() - job.started, 3),
            "finished_at": round(time.time(), 3),
            "worker": f"{os.uname().nodename}-{os.getpid()}",
            "node": os.uname().nodename,
            **self.facts,
        }
        if job.old is not None:
            return self.manifest.replace(job.old, files, facts)
        entry = self.manifest.commit(number, files, facts)
        self.attempts.end(number)
        return entry

    def _committed(self, most: int) -> Iterator[Entry]:
        """Entries of shards that are stored; waits for some while more than `most` are not."""
        while self._commits and (self._commits[0].done() or len(self._commits) > most):
            yield self._commits.pop(0).result()

    def _check_model(self) -> None:
        found, wanted = self.maker.model.sha256, self.segment.model_sha256
        if found != wanted:
            raise ValueError(
                f"model {self.config.model.uri} changed while the job ran: "
                f"{found[:12]} is not {wanted[:12]}"
            )


def _done(entry: Entry | None) -> Future[Entry]:
    future: Future[Entry] = Future()
    future.set_result(entry or {})
    return future
