"""When which block of shards is done by whom: the job's own blocks on workers of a fake engine.

Owns the fake engine's times and the loss of workers. Ray Data's part is what its actor pool does:
a worker has one block and a second one waits at it; a lost worker's two go to the others first.
"""

import heapq
import itertools
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from benchmarks.scale import figures
from rayjobs.generation.worker import blocks

MAX_IN_FLIGHT = 2
"""Of an actor in Ray Data's pool that runs one call at a time."""


@dataclass(frozen=True)
class Block:
    start: int
    size: int


@dataclass(frozen=True)
class Done:
    """A block that a worker finished `at` so many seconds."""

    at: float
    worker: int
    block: Block


@dataclass
class _Worker:
    number: int
    shard_s: float
    """Mean seconds of its shards."""
    queue: deque[Block] = field(default_factory=deque)
    since: float = 0.0
    is_lost: bool = False


@dataclass
class Schedule:
    """A run of so many shards on so many workers."""

    num_shards: int
    num_workers: int
    lost_per_hour: float = 0.0
    seed: int = 0
    busy_s: float = 0.0
    """Of all workers, on shards that count."""
    wasted_s: float = 0.0
    """Of lost workers, on shards that others make again."""
    end_s: float = 0.0
    idle_from_s: float | None = None
    """When the first worker had nothing left to do."""

    def run(self) -> Iterator[Done]:
        rng = self._rng = np.random.default_rng(self.seed)
        mean_s = figures.IMAGES_PER_SHARD / figures.IMAGES_PER_S
        factors = np.exp(rng.normal(0, figures.GPU_SPREAD, self.num_workers))
        times_s = mean_s * np.minimum(factors, figures.SLOWEST_GPU)
        workers = self._workers = [_Worker(n, float(s)) for n, s in enumerate(times_s)]
        self._waiting = deque(
            Block(*span) for span in blocks.spans(self.num_shards, self.num_workers)
        )
        self._events: list[tuple[float, int, str, _Worker]] = []
        self._numbers = itertools.count()
        for _ in range(MAX_IN_FLIGHT):
            for worker in workers:
                self._give(worker, 0.0)
        if self.lost_per_hour:
            for worker in workers:
                self._push(rng.exponential(3600 / self.lost_per_hour), "lost", worker)
        self._left = self.num_shards
        while self._left:
            at, _, what, worker = heapq.heappop(self._events)
            if what == "done":
                yield from self._finish(worker, at)
            elif what == "lost":
                self._lose(worker, at)
            else:
                worker.is_lost = False
                for _ in range(MAX_IN_FLIGHT):
                    self._give(worker, at)
            self.end_s = at

    def _push(self, at: float, what: str, worker: _Worker) -> None:
        heapq.heappush(self._events, (at, next(self._numbers), what, worker))

    def _give(self, worker: _Worker, now: float) -> None:
        """Give a worker a block; at once begun if it has no other."""
        if self._waiting:
            worker.queue.append(self._waiting.popleft())
            if len(worker.queue) == 1:
                self._begin(worker, now)
        elif not worker.queue and self.idle_from_s is None:
            self.idle_from_s = now

    def _begin(self, worker: _Worker, now: float) -> None:
        worker.since = now
        size = worker.queue[0].size
        spread = self._rng.normal(0, figures.SHARD_SPREAD * size**0.5)
        self._push(now + worker.shard_s * max(size + spread, 0.5 * size), "done", worker)

    def _finish(self, worker: _Worker, at: float) -> Iterator[Done]:
        block = worker.queue.popleft()
        self._left -= block.size
        self.busy_s += at - worker.since
        yield Done(at, worker.number, block)
        if worker.queue:
            self._begin(worker, at)
        self._give(worker, at)

    def _lose(self, worker: _Worker, at: float) -> None:
        """What it committed counts; the shard that it was making, and two unsaved ones, do not."""
        if worker.queue:
            block, spent_s = worker.queue.popleft(), at - worker.since
            kept = min(max(0, int(spent_s / worker.shard_s) - 2), block.size - 1)
            self.busy_s += kept * worker.shard_s
            self.wasted_s += spent_s - kept * worker.shard_s
            self._left -= kept
            self._waiting.extendleft(reversed(worker.queue))
            self._waiting.appendleft(Block(block.start + kept, block.size - kept))
            worker.queue.clear()
        worker.is_lost = True
        self._events = [each for each in self._events if each[3] is not worker]
        heapq.heapify(self._events)
        self._push(at + figures.REPLACED_AFTER_S, "back", worker)
        self._push(at + self._rng.exponential(3600 / self.lost_per_hour), "lost", worker)
        for other in self._workers:
            if self._waiting and not other.queue and not other.is_lost:
                self._give(other, at)


def tail(num_shards: int, num_workers: int, lost_per_hour: float) -> dict[str, float]:
    """How a run ends: its hours, and shares of the workers' time that made nothing."""
    run = Schedule(num_shards, num_workers, lost_per_hour)
    num_blocks = sum(1 for _ in run.run())
    paid_s = run.end_s * num_workers
    return {
        "blocks": num_blocks,
        "hours": run.end_s / 3600,
        "tail_s": run.end_s - (run.idle_from_s if run.idle_from_s is not None else run.end_s),
        "idle_share": 1 - (run.busy_s + run.wasted_s) / paid_s,
        "wasted_share": run.wasted_s / paid_s,
    }
