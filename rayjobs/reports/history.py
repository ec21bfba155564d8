"""A data set's history: counts, speed and failures over time, from its manifest alone.

Owns the columns kept of each finished shard, 52 bytes, and the arithmetic over them, and
what can be told without them. Knows nothing of pictures or of pages.
"""

import os
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from typing import Any

import numpy as np

PAUSE_S = 2.0
"""A longer time in which no worker had a shard is a pause, as between two runs, not slowness."""
SHORTEST_S = 1e-3
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
KINDS = {
    "shard": "q",
    "digest": "Q",
    "rows": "i",
    "failed": "i",
    "bytes": "q",
    "seconds": "d",
    "finished_at": "d",
    "worker": "i",
}


class Activity:
    """How many images were made, and when workers had shards: a few numbers for any data set."""

    def __init__(self) -> None:
        self.rows = 0
        self._starts: list[float] = []
        self._ends: list[float] = []
        self._is_known = True

    def add(self, entry: Mapping[str, Any]) -> None:
        self.rows += entry["rows"]
        end = entry.get("finished_at")
        if not end:
            self._is_known = False
            return
        start = end - max(entry.get("seconds") or 0.0, SHORTEST_S)
        first = bisect_left(self._ends, start - PAUSE_S)
        last = bisect_right(self._starts, end + PAUSE_S)
        if first < last:
            start, end = min(start, self._starts[first]), max(end, self._ends[last - 1])
        self._starts[first:last], self._ends[first:last] = [start], [end]

    @property
    def active_s(self) -> float:
        """As History's."""
        return sum(self._ends) - sum(self._starts) if self._is_known else 0.0

    @property
    def rate(self) -> float:
        """Images/s of all workers together, over the time in which they made any."""
        return self.rows / self.active_s if self.active_s else 0.0


class History:
    """Every finished shard's facts as columns of numbers; a hundred million images take 80 MB."""

    def __init__(self) -> None:
        self._columns = {name: array(kind) for name, kind in KINDS.items()}
        self._workers: dict[tuple[str, str], int] = {}
        self.suffix = ".parquet"
        """What the shards' files end in: it tells their format."""
        self.num_class_changed = 0

    def add(self, entry: Mapping[str, Any]) -> None:
        worker = (str(entry.get("node", "")), str(entry.get("worker", "")))
        facts = {
            "shard": entry["shard"],
            "digest": int(entry["sha256"][:16], 16),
            "rows": entry["rows"],
            "failed": entry["failed"],
            "bytes": entry.get("bytes", 0),
            "seconds": max(entry.get("seconds") or 0.0, SHORTEST_S),
            "finished_at": entry.get("finished_at") or np.nan,
            "worker": self._workers.setdefault(worker, len(self._workers)),
        }
        for name, value in facts.items():
            self._columns[name].append(value)
        self.suffix = os.path.splitext(entry["file"])[1]
        self.num_class_changed += bool(entry.get("class_changed"))

    def __len__(self) -> int:
        return len(self._columns["shard"])

    def column(self, name: str) -> np.ndarray:
        values = self._columns[name]
        return np.frombuffer(values, values.typecode) if len(values) else np.array([], KINDS[name])

    def total(self, name: str) -> int:
        return int(self.column(name).sum())

    def pictured(self, max_images: int) -> np.ndarray:
        """Positions of the shards to show: all, or as many as hold about `max_images` images.

        Multiples of the golden ratio are spread evenly and keep step with no prompt's period; and
        what is shown of a part of a data set is shown, mostly, of the whole.
        """
        rows = self.column("rows")
        if rows.sum() <= max_images:
            return np.arange(len(self))
        order = self._scattered(np.arange(len(self)))
        shown = np.cumsum(np.minimum(rows[order], rows_shown(max_images)))
        return np.sort(order[: max(1, int(np.searchsorted(shown, max_images, "right")))])

    def some(self, positions: np.ndarray, most: int) -> np.ndarray:
        """At most so many of these positions, chosen in the same way."""
        return np.sort(self._scattered(positions)[:most])

    def _scattered(self, positions: np.ndarray) -> np.ndarray:
        shards = self.column("shard")[positions].astype(np.uint64)
        return positions[np.argsort(shards * GOLDEN, kind="stable")]

    @property
    def span(self) -> tuple[float, float] | None:
        """When the first shard was begun and the last one finished, in unix seconds."""
        finished = self.column("finished_at")
        if not len(finished) or np.isnan(finished).any():
            return None
        return float((finished - self.column("seconds")).min()), float(finished.max())

    @property
    def active_s(self) -> float:
        """Seconds in which workers made images: from the first shard to the last, less pauses."""
        if self.span is None:
            return 0.0
        return self.span[1] - self.span[0] - sum(until - since for since, until in self.pauses)

    @property
    def rate(self) -> float:
        """Images/s of all workers together, over the time in which they made any."""
        return self.total("rows") / self.active_s if self.active_s else 0.0

    @property
    def pauses(self) -> list[tuple[float, float]]:
        """From when to when no worker had a shard, in unix seconds."""
        if self.span is None:
            return []
        starts = self.column("finished_at") - self.column("seconds")
        order = np.argsort(starts)
        until = np.maximum.accumulate(self.column("finished_at")[order])[:-1]
        after = starts[order][1:]
        long = after - until > PAUSE_S
        return list(zip(until[long].tolist(), after[long].tolist(), strict=True))

    def speed(self, bins: int, where: np.ndarray | None = None) -> np.ndarray:
        """Images/s in each of `bins` equal parts of the span; a shard's images are spread over it.

        `where` are positions of the shards that count.
        """
        return self._over_time("rows", bins, where)

    def failures(self, bins: int, where: np.ndarray | None = None) -> np.ndarray:
        """Failed images in each of `bins` equal parts of the span."""
        assert self.span is not None
        width_s = (self.span[1] - self.span[0]) / bins
        return self._over_time("failed", bins, where) * width_s

    def _over_time(self, name: str, bins: int, where: np.ndarray | None) -> np.ndarray:
        assert self.span is not None
        chosen = slice(None) if where is None else where
        amount, seconds = self.column(name)[chosen], self.column("seconds")[chosen]
        starts = self.column("finished_at")[chosen] - seconds
        edges = np.linspace(*self.span, bins + 1)
        done = [float((amount * np.clip((t - starts) / seconds, 0, 1)).sum()) for t in edges]
        return np.maximum(np.diff(done), 0) / (edges[1] - edges[0])

    @property
    def busy_s(self) -> np.ndarray:
        """By worker, the seconds in which it had shards; it may have several at a time."""
        ends, seconds = self.column("finished_at"), self.column("seconds")
        if self.span is None:
            return np.bincount(self.column("worker"), seconds, len(self._workers))
        order = np.lexsort((ends - seconds, self.column("worker")))
        worker = self.column("worker")[order]
        # Each worker's times are moved behind those of the one before, so that one pass does.
        moved = worker * (self.span[1] - self.span[0] + 1.0) - self.span[0]
        ends, starts = ends[order] + moved, (ends - seconds)[order] + moved
        covered = np.concatenate(([-np.inf], np.maximum.accumulate(ends)[:-1]))
        return np.bincount(
            worker, np.maximum(ends - np.maximum(starts, covered), 0), len(self._workers)
        )

    def workers(self) -> list[dict[str, Any]]:
        """Each worker's totals, those that failed most first, then the slowest."""
        worker = self.column("worker")
        sums = {
            name: np.bincount(worker, self.column(name), len(self._workers))
            for name in ("rows", "failed")
        }
        busy_s = np.maximum(self.busy_s, SHORTEST_S)
        shards = np.bincount(worker, minlength=len(self._workers))
        totals = [
            {
                "number": number,
                "node": node,
                "worker": name,
                "shards": int(shards[number]),
                "images": int(sums["rows"][number]),
                "failed": int(sums["failed"][number]),
                "busy_s": float(busy_s[number]),
                "images_per_s": float(sums["rows"][number] / busy_s[number]),
            }
            for (node, name), number in self._workers.items()
        ]
        return sorted(totals, key=lambda one: (-one["failed"], one["images_per_s"]))

    def of_worker(self, number: int) -> np.ndarray:
        """Positions of the shards that a worker made."""
        return np.flatnonzero(self.column("worker") == number)


def rows_shown(max_images: int) -> int:
    """How many images of one shard are shown where not all can be: of 64 shards at least."""
    return max(16, max_images // 64)
