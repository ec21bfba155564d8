"""How long steps take and how much memory they need, learned from those that were made.

Owns the model of a step's time (a constant and so much for each place, by shape), of its memory,
and what follows: how large a call may be, and how long work will take. Knows nothing of rows.
"""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

MEMORY_FRACTION = 0.9
"""Of the free memory that a call may be expected to need."""
LEAST_SPREAD = 0.5
"""Of places: below it, calls of one size only were seen lately."""
WORTH = 1.04
"""What a place may cost, as many times what it costs in the fullest calls."""
FORGET = 0.97
"""What an observation still counts for after the next one."""
FIRST_GUESS_S = 2e-6
"""A place's seconds for each latent pixel, before anything was seen."""

Key = tuple[Hashable, tuple[int, ...]]
"""A model's weights and a latent shape (C, H, W)."""


@dataclass(frozen=True)
class _Line:
    """A line through points (x, y), older ones counting less and less; it never falls.

    Never changed, but replaced: others read it while the engine's thread learns.
    """

    n: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0

    def with_point(self, x: float, y: float) -> "_Line":
        past = (FORGET * value for value in (self.n, self.x, self.y, self.xx, self.xy))
        new = (1.0, x, y, x * x, x * y)
        return _Line(*(old + value for old, value in zip(past, new, strict=True)))

    @property
    def spread(self) -> float:
        """The variance of x: how much is known of sizes other than the usual one."""
        return self.xx / self.n - (self.x / self.n) ** 2 if self.n else 0.0

    def at(self, x: float) -> float:
        mean_x, mean_y = self.x / self.n, self.y / self.n
        if self.spread < LEAST_SPREAD:
            return mean_y * x / mean_x
        slope = max(0.0, (self.xy / self.n - mean_x * mean_y) / self.spread)
        if mean_y - slope * mean_x < 0:
            return mean_y * x / mean_x
        return mean_y + slope * (x - mean_x)


@dataclass
class _Known:
    """What was seen of one shape."""

    steps: _Line = field(default_factory=_Line)
    image_s: float | None = None
    place_bytes: float = 0.0
    most_places: int | None = None
    """Since a larger call ran out of memory."""


class Forecast:
    """What steps of every shape cost on this device; `most_places` bounds every call."""

    def __init__(self, most_places: int, most_step_s: float):
        self.most_places = most_places
        self.most_step_s = most_step_s
        self.free_bytes: float | None = None
        """What a call may use at most; None where memory is not the bound."""
        self._known: dict[Key, _Known] = {}

    def saw_step(self, key: Key, places: int, seconds: float, num_bytes: float = 0.0) -> None:
        known = self._of(key)
        known.steps = known.steps.with_point(places, seconds)
        known.place_bytes = max(known.place_bytes, num_bytes / places)

    def saw_image(self, key: Key, seconds: float) -> None:
        known = self._of(key)
        past = known.image_s
        known.image_s = seconds if past is None else 0.8 * past + 0.2 * seconds

    def ran_out(self, key: Key, places: int) -> None:
        """A call of so many places did not fit: none so large is tried again."""
        self._of(key).most_places = max(1, places // 2)

    def bound(self, key: Key) -> int:
        """Places of a call: as many as fit the memory and the longest step."""
        known, most = self._known.get(key), self.most_places
        if known is None:
            return most
        most = min(most, known.most_places or most)
        if self.free_bytes is not None and known.place_bytes:
            most = min(most, int(MEMORY_FRACTION * self.free_bytes / known.place_bytes))
        if known.steps.n:
            most = self._worth_while(known.steps, most)
        return max(1, most)

    def _worth_while(self, steps: _Line, most: int) -> int:
        """The fewest places whose steps cost each of them hardly more than the fullest calls do.

        Larger calls would only make all of their rows wait for each other.
        """
        while most > 2 and steps.at(most) > self.most_step_s:
            most -= 1
        if steps.spread < LEAST_SPREAD:
            return most  # others have not been tried for long: they are to be
        least_s = WORTH * steps.at(most) / most
        return next(n for n in range(1, most + 1) if steps.at(n) / n <= least_s)

    def step_s(self, key: Key, places: int) -> float:
        known = self._known.get(key)
        if known is not None and known.steps.n:
            return known.steps.at(places)
        area = key[1][-1] * key[1][-2]
        near = [k for k, seen in list(self._known.items()) if seen.steps.n]
        near = [k for k in near if k[0] == key[0]] or near
        if not near:
            return FIRST_GUESS_S * area * places
        nearest = min(near, key=lambda k: abs(k[1][-1] * k[1][-2] - area))
        scale = area / (nearest[1][-1] * nearest[1][-2])
        return scale * self._known[nearest].steps.at(places)

    def work_s(self, key: Key, place_steps: int, images: int) -> float:
        """Seconds of work: so many places' steps in full calls, and what images take besides."""
        most = self.bound(key)
        return place_steps * self.step_s(key, most) / most + images * self._image_s(key)

    def drain_s(self, key: Key, rows: Iterable[tuple[int, int]]) -> float:
        """Seconds until rows of (steps left, places) are done if no others come: as they leave,
        calls have fewer places, and each of these costs more."""
        ordered, most = sorted(rows), self.bound(key)
        places, done, total_s = sum(own for _, own in ordered), 0, 0.0
        for steps, own in ordered:
            if steps > done:
                together = min(most, places)
                total_s += (steps - done) * self.step_s(key, together) * places / together
            places, done = places - own, steps
        return total_s + len(ordered) * self._image_s(key)

    def _image_s(self, key: Key) -> float:
        known = self._known.get(key)
        return 0.0 if known is None else known.image_s or 0.0

    def _of(self, key: Key) -> _Known:
        return self._known.setdefault(key, _Known())
