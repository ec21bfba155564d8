"""Fair scheduling: shapes share the time, callers share a shape, and the earliest due row is first.

Owns the order in which waiting rows are stepped. Knows nothing of tensors, of HTTP or of Ray.
Switching rows between two steps is free: a row that is not chosen keeps its latents in memory.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

STRETCH = 4.0
"""A row is due this many times its remaining work after its arrival."""
AGEING_S = 10.0
"""A shape whose oldest row has waited this long gets twice its share of the time."""

K = TypeVar("K", bound=Hashable)


class FairQueue(Generic[K]):
    """Virtual-time fair queueing: the key that has used the least time goes next.

    A key that returns after a pause starts where the others are: idle time is not saved up.
    """

    def __init__(self) -> None:
        self._used: dict[K, float] = {}
        self._now = 0.0

    def order(self, keys: Iterable[K]) -> list[K]:
        """The waiting keys, the next one first."""
        waiting = list(keys)
        if not waiting:
            return []
        self._now = max(self._now, min(self._used.get(key, self._now) for key in waiting))
        ahead = {key: used for key, used in self._used.items() if used > self._now}
        self._used = dict.fromkeys(waiting, self._now) | ahead
        return sorted(waiting, key=self._used.__getitem__)

    def charge(self, key: K, seconds: float, weight: float = 1.0) -> None:
        self._used[key] = self._used.get(key, self._now) + seconds / weight


@dataclass(frozen=True)
class RowPriority:
    """What decides when a row is stepped."""

    caller: str
    arrived_s: float
    """On the monotonic clock."""
    work_s: float
    """Its whole work in seconds, in full batches."""

    def due_s(self, share_left: float) -> float:
        """Short work is due early; long work becomes due once it has waited long enough."""
        return self.arrived_s + STRETCH * self.work_s * share_left


class PrioritizedRow(Protocol):
    """The part of an engine's row that is read here."""

    @property
    def id(self) -> int: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def num_slots(self) -> int: ...
    @property
    def share_left(self) -> float: ...
    @property
    def share(self) -> float: ...
    @property
    def reuses(self) -> bool: ...
    @property
    def controls(self) -> Sequence[object]: ...
    @property
    def ip_adapters(self) -> Sequence[object]: ...
    @property
    def request(self) -> Hashable: ...


R = TypeVar("R", bound=PrioritizedRow)
Shape = tuple[int, ...]


@dataclass(frozen=True)
class BatchUsage:
    """Who used a batch: its time may be known only after its rows have left."""

    shape: Shape
    rows: int
    slots: int
    oldest_s: float
    callers: tuple[tuple[str, int], ...]
    """Each row's caller and slots."""
    is_plain: bool = True
    """No row reused deep features or had a picture to follow: what the batch cost tells what others
    will."""


class FairBatcher(Generic[R]):
    """A batcher for the engine: shapes share the time in proportion to their rows, callers share a
    shape's slots, and rows that are due early go first.

    There are at most `max_rows` rows in a batch, more where some take a share of their slots.
    `bound(shape)` is the number of slots that a batch of that shape may have. The caller puts a
    request's priority into `priorities` before it adds the request.
    """

    def __init__(
        self,
        max_rows: int,
        bound: Callable[[Shape], int],
        clock: Callable[[], float] = time.monotonic,
    ):
        self.max_rows = max_rows
        self.priorities: dict[Hashable, RowPriority] = {}
        self._bound = bound
        self._clock = clock
        self._rows: dict[Shape, dict[int, R]] = {}
        self._shapes: FairQueue[Shape] = FairQueue()
        self._callers: defaultdict[Shape, FairQueue[str]] = defaultdict(FairQueue)
        self.chosen: list[R] = []
        """The rows of the last batch."""
        self.usage: BatchUsage | None = None
        """Who is to be charged for the last batch."""

    def __len__(self) -> int:
        return sum(len(rows) for rows in self._rows.values())

    def add(self, row: R) -> None:
        self._rows.setdefault(row.shape, {})[row.id] = row

    def discard(self, row: R) -> None:
        rows = self._rows.get(row.shape, {})
        rows.pop(row.id, None)
        if not rows:
            self._rows.pop(row.shape, None)
            self._callers.pop(row.shape, None)

    def choose(self) -> list[R]:
        """The rows of the next batch; empty when no row waits."""
        self.chosen = []
        if self._rows:
            shape = self._shapes.order(self._rows)[0]
            self.chosen = self._fill_batch(shape)
        self.usage = self._usage(self.chosen) if self.chosen else None
        return self.chosen

    def charge(self, usage: BatchUsage, seconds: float) -> None:
        """Account for a batch: to its shape by time, to its callers by their slots.

        A shape with more rows in a batch gets as much more time: every row has the same share.
        """
        if usage.shape not in self._rows:
            return
        aged = max(0.0, self._clock() - usage.oldest_s) / AGEING_S
        self._shapes.charge(usage.shape, seconds, usage.rows * (1 + aged))
        for caller, slots in usage.callers:
            self._callers[usage.shape].charge(caller, seconds * slots / usage.slots)

    def _usage(self, rows: list[R]) -> BatchUsage:
        priorities = [self._priority(row) for row in rows]
        callers = [(p.caller, row.num_slots) for p, row in zip(priorities, rows, strict=True)]
        slots = sum(row.num_slots for row in rows)
        oldest_s = min(priority.arrived_s for priority in priorities)
        is_plain = not any(row.reuses or row.controls or row.ip_adapters for row in rows)
        return BatchUsage(rows[0].shape, len(rows), slots, oldest_s, tuple(callers), is_plain)

    def _fill_batch(self, shape: Shape) -> list[R]:
        """One row of each caller in turn, its earliest due first, until the batch is full."""
        waiting: dict[str, list[R]] = defaultdict(list)
        for row in self._rows[shape].values():
            waiting[self._priority(row).caller].append(row)
        for rows in waiting.values():
            rows.sort(key=self._due, reverse=True)
        room, rows_left, batch = self._bound(shape), float(self.max_rows), []
        callers = self._callers[shape].order(waiting)
        while callers:
            for caller in list(callers):
                row = waiting[caller][-1]
                if (row.num_slots > room and batch) or row.share > rows_left:
                    return batch
                batch.append(waiting[caller].pop())
                room, rows_left = room - row.num_slots, rows_left - row.share
                if not waiting[caller]:
                    callers.remove(caller)
        return batch

    def _due(self, row: R) -> tuple[float, int]:
        return self._priority(row).due_s(row.share_left), row.id

    def _priority(self, row: R) -> RowPriority:
        return self.priorities[row.request]
