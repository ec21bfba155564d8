"""Predicts how long steps take and how much memory they need, from the steps made so far.

Owns the model of a step's time (a constant plus a cost per slot, for each shape) and of its memory,
and what follows from them: how large a batch may be, and how long work will take. Knows nothing of
rows. A slot is one row of a UNet call; an image with guidance takes two.
"""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

MEMORY_FRACTION = 0.9
"""Share of the free memory that a batch may be expected to need."""
MIN_VARIANCE = 0.5
"""Of the number of slots: below it, recent batches had one size only."""
MAX_RELATIVE_COST = 1.04
"""What a slot may cost, relative to its cost in the largest batch."""
DECAY = 0.97
"""Weight of an observation after the next one."""
MIN_STEPS = 1.9
"""Observations, weighted by DECAY: two. A first step also warms up what later ones use."""
FIRST_GUESS_S = 2e-6
"""Seconds per slot and latent pixel, before any observation."""

Key = tuple[Hashable, tuple[int, ...]]
"""A model's weights and a latent shape (C, H, W)."""


@dataclass(frozen=True)
class _Line:
    """A line through points (x, y), by least squares with decaying weights; it never falls.

    Immutable, because the event loop reads it while the engine's thread replaces it.
    """

    n: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0

    def with_point(self, x: float, y: float) -> "_Line":
        past = (DECAY * value for value in (self.n, self.x, self.y, self.xx, self.xy))
        new = (1.0, x, y, x * x, x * y)
        return _Line(*(old + value for old, value in zip(past, new, strict=True)))

    @property
    def variance(self) -> float:
        """Of x: how much is known about batch sizes other than the usual one."""
        return self.xx / self.n - (self.x / self.n) ** 2 if self.n else 0.0

    def at(self, x: float) -> float:
        mean_x, mean_y = self.x / self.n, self.y / self.n
        if self.variance < MIN_VARIANCE:
            return mean_y * x / mean_x
        slope = max(0.0, (self.xy / self.n - mean_x * mean_y) / self.variance)
        if mean_y - slope * mean_x < 0:
            return mean_y * x / mean_x
        return mean_y + slope * (x - mean_x)


@dataclass
class _Observed:
    """What was observed for one model and shape."""

    steps: _Line = field(default_factory=_Line)
    image_s: float | None = None
    slot_bytes: float = 0.0
    """A decaying maximum: one unusual step does not shrink all later batches."""
    max_slots: int | None = None
    """Set when a larger batch ran out of memory."""


class Forecast:
    """The cost of steps of every shape on this device; no batch is larger than `max_slots`."""

    def __init__(self, max_slots: int, max_step_s: float):
        self.max_slots = max_slots
        self.max_step_s = max_step_s
        self.free_bytes: float | None = None
        """What a batch may use at most; None where memory is not limited."""
        self._observed: dict[Key, _Observed] = {}

    def observe_step(self, key: Key, slots: int, seconds: float) -> None:
        observed = self._get(key)
        observed.steps = observed.steps.with_point(slots, seconds)

    def observe_memory(self, key: Key, slots: int, num_bytes: float) -> None:
        """The peak of a step that had the device's memory to itself."""
        observed = self._get(key)
        newest, past = num_bytes / slots, observed.slot_bytes
        observed.slot_bytes = max(newest, DECAY * past + (1 - DECAY) * newest)

    def observe_image(self, key: Key, seconds: float) -> None:
        observed = self._get(key)
        past = observed.image_s
        observed.image_s = seconds if past is None else 0.8 * past + 0.2 * seconds

    def observe_oom(self, key: Key, slots: int) -> None:
        """A batch of `slots` ran out of memory: no batch as large is tried again."""
        self._get(key).max_slots = max(1, slots // 2)

    def bound(self, key: Key) -> int:
        """Slots of a batch: as many as fit the memory and the longest step."""
        observed, bound = self._observed.get(key), self.max_slots
        if observed is None:
            return bound
        bound = min(bound, observed.max_slots or bound)
        if self.free_bytes is not None and observed.slot_bytes:
            bound = min(bound, int(MEMORY_FRACTION * self.free_bytes / observed.slot_bytes))
        if observed.steps.n:
            bound = self._efficient_bound(observed.steps, bound)
        return max(1, bound)

    def _efficient_bound(self, steps: _Line, bound: int) -> int:
        """The smallest batch that is about as fast per slot as the largest.

        A larger batch would only make its rows wait for each other.
        """
        while bound > 2 and steps.at(bound) > self.max_step_s:
            bound -= 1
        if steps.variance < MIN_VARIANCE:
            return bound  # only one size was seen lately: the largest shows what others cost
        limit_s = MAX_RELATIVE_COST * steps.at(bound) / bound
        return next(n for n in range(1, bound + 1) if steps.at(n) / n <= limit_s)

    def step_s(self, key: Key, slots: int) -> float:
        """Seconds of a step; a shape not seen yet is scaled by area from the nearest one."""
        observed = self._observed.get(key)
        if observed is not None and observed.steps.n:
            return observed.steps.at(slots)
        seen = self._seen(key) or self._seen()
        if not seen:
            return FIRST_GUESS_S * _area(key) * slots
        return self._scaled_s(key, slots, seen)

    def known_step_s(self, key: Key, slots: int) -> float | None:
        """As `step_s`, where more than one step of this model tells it; else None."""
        observed = self._observed.get(key)
        if observed is not None and observed.steps.n >= MIN_STEPS:
            return observed.steps.at(slots)
        seen = [k for k in self._seen(key) if self._observed[k].steps.n >= MIN_STEPS]
        return self._scaled_s(key, slots, seen) if seen else None

    def _seen(self, like: Key | None = None) -> list[Key]:
        """Keys of steps that were made: of the model of `like`, or of any."""
        seen = (k for k, other in list(self._observed.items()) if other.steps.n)
        return [k for k in seen if like is None or k[0] == like[0]]

    def _scaled_s(self, key: Key, slots: int, seen: list[Key]) -> float:
        """A slot of a larger shape costs as much more; what a step costs without slots stays."""
        nearest = min(seen, key=lambda k: abs(_area(k) - _area(key)))
        return self._observed[nearest].steps.at(slots * _area(key) / _area(nearest))

    def work_s(self, key: Key, slot_steps: float, images: int) -> float:
        """Seconds of work: `slot_steps` in full batches, and encoding and decoding of `images`."""
        bound = self.bound(key)
        return slot_steps * self.step_s(key, bound) / bound + images * self._image_s(key)

    def drain_s(self, key: Key, rows: Iterable[tuple[int, int]]) -> float:
        """Seconds until rows of (steps left, slots) are done if no others come.

        As rows finish, batches get smaller and each slot costs more.
        """
        ordered, bound = sorted(rows), self.bound(key)
        slots, done, total_s = sum(own for _, own in ordered), 0, 0.0
        for steps, own in ordered:
            if steps > done:
                batch = min(bound, slots)
                total_s += (steps - done) * self.step_s(key, batch) * slots / batch
            slots, done = slots - own, steps
        return total_s + len(ordered) * self._image_s(key)

    def _image_s(self, key: Key) -> float:
        observed = self._observed.get(key)
        return 0.0 if observed is None else observed.image_s or 0.0

    def _get(self, key: Key) -> _Observed:
        return self._observed.setdefault(key, _Observed())


def _area(key: Key) -> int:
    return key[1][-1] * key[1][-2]
