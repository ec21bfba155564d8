"""The start on a cold cluster: every node fetches the model from one prefix of S3 at the same time.

The streams, ranges, tries and pauses of `rayjobs.storage.ranges`, by events, against a server that
answers no more than its limit of requests a second and refuses the rest, as S3 does with 503.
"""

import heapq
import itertools
import math
import random
from dataclasses import dataclass

from benchmarks.scale import figures
from rayjobs.storage import ranges

BOTO_TRIES = 3
"""Of botocore in its standard mode, each after up to 1, 2, ... seconds."""


@dataclass
class _Stream:
    node: int
    boto_try: int = 1
    own_try: int = 1


class Fetch:
    """The fetch by so many nodes, which begin within a second."""

    def __init__(self, num_nodes: int, seed: int = 0):
        self.rng, self._order = random.Random(seed), itertools.count()
        self.num_ranges = math.ceil(figures.MODEL_BYTES / ranges.RANGE_BYTES)
        speed = min(figures.STREAM_BYTES_PER_S, figures.NODE_BYTES_PER_S / ranges.STREAMS)
        self.range_s = figures.REQUEST_S + ranges.RANGE_BYTES / speed
        self._left, self._fetched = [self.num_ranges] * num_nodes, [0] * num_nodes
        self.ended = [math.inf] * num_nodes
        """When each node had the model, in seconds."""
        self.failed: set[int] = set()
        self.requests = self.refused = 0
        self._window = self._asked = 0
        self._events: list[tuple[float, int, bool, _Stream]] = []
        for node in range(num_nodes):
            begun = self.rng.random()
            for _ in range(min(ranges.STREAMS, self.num_ranges)):
                self._next(node, begun)

    def run(self) -> "Fetch":
        while self._events:
            at, _, is_there, stream = heapq.heappop(self._events)
            if stream.node in self.failed:
                continue
            if is_there:
                self._take(stream.node, at)
            else:
                self._ask(stream, at)
        return self

    def _push(self, at: float, is_there: bool, stream: _Stream) -> None:
        heapq.heappush(self._events, (at, next(self._order), is_there, stream))

    def _next(self, node: int, at: float) -> None:
        if self._left[node]:
            self._left[node] -= 1
            self._push(at, False, _Stream(node))

    def _take(self, node: int, at: float) -> None:
        self._fetched[node] += 1
        if self._fetched[node] == self.num_ranges:
            self.ended[node] = at
        self._next(node, at)

    def _ask(self, stream: _Stream, at: float) -> None:
        self.requests += 1
        if int(at) != self._window:
            self._window, self._asked = int(at), 0
        self._asked += 1
        if self._asked <= figures.READS_PER_S:
            self._push(at + self.range_s, True, stream)
            return
        self.refused += 1
        pause_s = _pause_s(stream, self.rng)
        if pause_s is None:
            self.failed.add(stream.node)
        else:
            self._push(at + figures.REQUEST_S + pause_s, False, stream)


def _pause_s(stream: _Stream, rng: random.Random) -> float | None:
    """Until the next try of a refused range; None when there is none."""
    if stream.boto_try < BOTO_TRIES:
        stream.boto_try += 1
        return rng.random() * 2 ** (stream.boto_try - 2)
    if stream.own_try == ranges.TRIES:
        return None
    pause_s = rng.uniform(0, min(2.0**stream.own_try, ranges.LONGEST_PAUSE_S))
    stream.own_try, stream.boto_try = stream.own_try + 1, 1
    return pause_s


def start(num_gpus: int, gpus_per_node: int = figures.GPUS_PER_NODE) -> dict[str, float]:
    """Seconds until 95 % of the workers have made an image, and what they are spent on."""
    num_nodes = math.ceil(num_gpus / gpus_per_node)
    found = Fetch(num_nodes).run()
    fetch_s = sorted(found.ended)[math.ceil(0.95 * num_nodes) - 1]
    place_s = num_gpus / figures.ACTORS_PER_S
    load_s = figures.MODEL_BYTES / figures.LOAD_BYTES_PER_S
    return {
        "gpus": num_gpus,
        "nodes": num_nodes,
        "requests": found.requests,
        "refused": found.refused,
        "gave_up": len(found.failed),
        "place_s": place_s,
        "fetch_s": fetch_s,
        "load_s": load_s,
        "total_s": place_s + figures.IMPORT_S + fetch_s + load_s + figures.FIRST_IMAGE_S,
    }
