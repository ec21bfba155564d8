"""What keys have at this moment: requests in progress, and images left of this minute.

Owns both counts. Knows neither Ray nor HTTP: an ingress replica counts with one of these what it
does itself, and an actor with another one what all of them do.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

MINUTE_S = 60.0
SILENCE_S = 10.0
"""A replica that has not reported for so long is gone, and its requests with it."""


@dataclass(frozen=True)
class Lease:
    """Images that a replica may hand on; without any, seconds after which to ask again."""

    images: float
    wait_s: float = 0.0


class Counts:
    """Counts by key's name. `replica` is whoever counts: what it says of itself is the truth."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._active: dict[str, dict[str, int]] = {}
        """Requests in progress, by replica and key."""
        self._seen_s: dict[str, float] = {}
        self._buckets: dict[str, tuple[float, float]] = {}
        """Images left, and when that was so."""

    def report(self, replica: str, active: Mapping[str, int]) -> None:
        """All requests that a replica has in progress, by key."""
        self._active[replica] = dict(active)
        self._seen_s[replica] = self._clock()

    def enter(self, replica: str, name: str, active: int, most: int) -> bool:
        """Whether a replica may have so many requests of a key, the new one among them."""
        self._forget_silent()
        others = sum(each.get(name, 0) for at, each in self._active.items() if at != replica)
        if others + active > most:
            return False
        self._active.setdefault(replica, {})[name] = active
        self._seen_s[replica] = self._clock()
        return True

    def take(self, name: str, images: float, per_minute: float, ahead: float = 0.0) -> Lease:
        """Images from a key's token bucket, which refills in a minute; `ahead` more if there are.

        More than the bucket holds takes all of it; otherwise it could never be served.
        """
        left, wanted = self._left(name, per_minute), min(images, per_minute)
        if left < wanted:
            return Lease(0.0, (wanted - left) * MINUTE_S / per_minute)
        granted = min(left, wanted + ahead)
        self._buckets[name] = (left - granted, self._clock())
        return Lease(granted)

    def give_back(self, name: str, images: float, per_minute: float) -> None:
        left = min(per_minute, self._left(name, per_minute) + images)
        self._buckets[name] = (left, self._clock())

    def silent_s(self) -> float:
        """How long no replica has reported."""
        return self._clock() - max(self._seen_s.values(), default=0.0)

    def _left(self, name: str, per_minute: float) -> float:
        now_s = self._clock()
        left, since_s = self._buckets.get(name, (per_minute, now_s))
        return min(per_minute, left + per_minute / MINUTE_S * (now_s - since_s))

    def _forget_silent(self) -> None:
        oldest_s = self._clock() - SILENCE_S
        for replica in [each for each, seen_s in self._seen_s.items() if seen_s < oldest_s]:
            del self._seen_s[replica], self._active[replica]
