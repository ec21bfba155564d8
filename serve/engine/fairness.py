"""Whose turn it is: models and shapes by time used, then callers, then the nearest to its due time.

Owns the order in which waiting rows are stepped. Knows nothing of tensors, of HTTP or of Ray. Steps
are so short that order costs nothing: whoever is not chosen waits with its latents where it is.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

STRETCH = 4.0
"""How many times the work it has left a row waits while rows that came later go before it."""
AGEING_S = 10.0
"""A flow whose oldest row has waited so long gets twice its share of the time."""

K = TypeVar("K", bound=Hashable)


class Turns(Generic[K]):
    """Deficit round robin in continuous form: the one who has had least time goes next.

    Whoever comes back after a pause starts where the others are: idle time is not saved up.
    """

    def __init__(self) -> None:
        self._used: dict[K, float] = {}
        self._now = 0.0

    def order(self, keys: Iterable[K]) -> list[K]:
        """Those that want a turn, the first to have one first."""
        wanting = list(keys)
        if not wanting:
            return []
        self._now = max(self._now, min(self._used.get(key, self._now) for key in wanting))
        ahead = {key: used for key, used in self._used.items() if used > self._now}
        self._used = dict.fromkeys(wanting, self._now) | ahead
        return sorted(wanting, key=self._used.__getitem__)

    def charge(self, key: K, seconds: float, weight: float = 1.0) -> None:
        self._used[key] = self._used.get(key, self._now) + seconds / weight


@dataclass(frozen=True)
class Ticket:
    """What is known of a row besides its tensors."""

    caller: str
    arrived_s: float
    """On the monotonic clock."""
    work_s: float
    """Its whole work, if it were alone in full batches."""

    def due_s(self, share_left: float) -> float:
        """What is soon done is due soon; long work is, too, once it has waited long enough."""
        return self.arrived_s + STRETCH * self.work_s * share_left


class TicketRow(Protocol):
    """What of an engine's row is read here."""

    @property
    def id(self) -> int: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def num_slots(self) -> int: ...
    @property
    def share_left(self) -> float: ...
    @property
    def request(self) -> Hashable: ...


R = TypeVar("R", bound=TicketRow)
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Receipt:
    """What a call was: its time may be known only when its rows are gone."""

    shape: Shape
    rows: int
    places: int
    oldest_s: float
    callers: tuple[tuple[str, int], ...]
    """Whose rows, and the places of each."""


class FairBatcher(Generic[R]):
    """A batcher for the engine: shapes share the time by the rows of their calls, callers share a
    shape's places, short rows go first.

    `bound(shape)` is how many places a call of that shape may have. `tickets` are put in by
    whoever adds a request, before it does.
    """

    def __init__(
        self,
        max_rows: int,
        bound: Callable[[Shape], int],
        clock: Callable[[], float] = time.monotonic,
    ):
        self.max_rows = max_rows
        self.tickets: dict[Hashable, Ticket] = {}
        self._bound = bound
        self._clock = clock
        self._rows: dict[Shape, dict[int, R]] = {}
        self._shapes: Turns[Shape] = Turns()
        self._callers: defaultdict[Shape, Turns[str]] = defaultdict(Turns)
        self.chosen: list[R] = []
        """The rows of the last call."""
        self.receipt: Receipt | None = None
        """What is to be charged for the last call."""

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
        """The rows of the next call; none when nothing is here."""
        self.chosen = []
        if self._rows:
            shape = self._shapes.order(self._rows)[0]
            self.chosen = self._deal(shape)
        self.receipt = self._receipt(self.chosen) if self.chosen else None
        return self.chosen

    def charge(self, receipt: Receipt, seconds: float) -> None:
        """Account for a call: to its shape by time, to its callers by their places.

        A shape whose calls hold more rows gets as much more: the share is each row's.
        """
        if receipt.shape not in self._rows:
            return
        aged = max(0.0, self._clock() - receipt.oldest_s) / AGEING_S
        self._shapes.charge(receipt.shape, seconds, receipt.rows * (1 + aged))
        for caller, places in receipt.callers:
            self._callers[receipt.shape].charge(caller, seconds * places / receipt.places)

    def _receipt(self, rows: list[R]) -> Receipt:
        tickets = [self._ticket(row) for row in rows]
        callers = [(t.caller, row.num_slots) for t, row in zip(tickets, rows, strict=True)]
        places = sum(row.num_slots for row in rows)
        oldest_s = min(ticket.arrived_s for ticket in tickets)
        return Receipt(rows[0].shape, len(rows), places, oldest_s, tuple(callers))

    def _deal(self, shape: Shape) -> list[R]:
        """One row of each caller by turns, its most due first, until the call is full."""
        waiting: dict[str, list[R]] = defaultdict(list)
        for row in self._rows[shape].values():
            waiting[self._ticket(row).caller].append(row)
        for rows in waiting.values():
            rows.sort(key=self._due, reverse=True)
        room, dealt = self._bound(shape), []
        callers = self._callers[shape].order(waiting)
        while callers and len(dealt) < self.max_rows:
            for caller in list(callers):
                row = waiting[caller][-1]
                if (row.num_slots > room and dealt) or len(dealt) == self.max_rows:
                    return dealt
                dealt.append(waiting[caller].pop())
                room -= row.num_slots
                if not waiting[caller]:
                    callers.remove(caller)
        return dealt

    def _due(self, row: R) -> tuple[float, int]:
        return self._ticket(row).due_s(row.share_left), row.id

    def _ticket(self, row: R) -> Ticket:
        return self.tickets[row.request]
