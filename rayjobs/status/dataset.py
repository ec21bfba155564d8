"""How far a data set is: counts, recent rate, failures, workers, from its manifest.

Owns what is read for it, which does not grow with the data set: the manifest's names, the entries
of the last shards, and a few of those with failures. Knows nothing of clusters.
"""

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rayjobs.config import BadInput
from rayjobs.dataset.lock import read_lock
from rayjobs.dataset.manifest import GROUP, Manifest
from rayjobs.reports import contact_sheet, dataset_report, figures
from rayjobs.reports.history import History

MAX_GROUPS = 64
"""Compact files that are read, the last ones: of 64,000 shards."""
MAX_SINGLES = 4_000
"""Entries outside of them that are read, the last ones."""
MAX_FAILED_SHARDS = 16
"""Shards that are read for the reasons of their failures, the last ones."""
WINDOW_S = 300.0
"""What counts as the last minutes, unless a shard takes so long that few would end in them."""
SILENCE_S = 120.0
SLOWEST = 3


@dataclass(frozen=True)
class DataSetStatus:
    """A data set at one moment."""

    state: str
    """`done`, `in progress`, `silent`: no shard was committed for long, or `begun`: none yet."""
    shards: int
    num_shards: int
    images: int
    """Of the finished shards, failed ones included."""
    num_images: int
    looked_at: int
    """Shards whose entries were read: what follows is told by them."""
    failed: int
    reasons: dict[str, int]
    """Failed images by reason, of the last shards that have any."""
    rate: float | None
    """Images/s of all workers in the last minutes before the last commit."""
    window_s: float
    eta_s: float | None
    """Seconds to the end at that rate; None unless it is in progress."""
    last_commit: float | None
    """In unix seconds."""
    slowest: list[dict[str, Any]] = field(default_factory=list)
    """Of the workers of these minutes those with the fewest images/s."""
    kind: str = "data set"

    def text(self, uri: str) -> str:
        lines = [
            f"{self.kind} {uri}: {self.state}",
            f"  shards   {self.shards:,} of {self.num_shards:,} "
            f"({figures.percent(self.shards, self.num_shards)}); {self.images:,} of "
            f"{self.num_images:,} images",
        ]
        if self.rate is not None:
            left = "" if self.eta_s is None else f", {figures.duration(self.eta_s)} left"
            over = figures.duration(self.window_s)
            lines.append(f"  rate     {figures.rate(self.rate)} images/s over {over}{left}")
        if self.last_commit is not None:
            ago = figures.duration(max(0.0, time.time() - self.last_commit))
            lines.append(f"  last     {figures.moment(self.last_commit)} UTC, {ago} ago")
        lines += self._failures() + self._slow()
        if self.state == "silent":
            lines.append(
                "  nobody seems to work at it; the command that makes it continues where it stopped"
            )
        return "\n".join(lines)

    def _failures(self) -> list[str]:
        of = "" if self.looked_at == self.shards else f" in the last {self.looked_at:,} shards"
        lines = [f"  failed   {figures.count(self.failed, 'image')}{of}"] if self.failed else []
        return lines + [f"    {count:,} x {reason}" for reason, count in self.reasons.items()]

    def _slow(self) -> list[str]:
        return [
            f"  {'slowest' if not at else '':8} {one['worker']} on {one['node']}: "
            f"{figures.rate(one['images_per_s'])} images/s, {one['failed']:,} failed"
            for at, one in enumerate(self.slowest)
        ]


class DataSetWatch:
    """Looks at the data set at `uri`, again and again; each entry is read once."""

    def __init__(self, uri: str):
        self._uri = uri
        self._history = History()
        self._seen = np.zeros(0, bool)
        self._reasons: dict[int, dict[str, Any]] = {}
        """Of shards with failures, by shard."""

    def look(self) -> DataSetStatus:
        lock = read_lock(self._uri)
        if lock is None:
            raise BadInput(f"{self._uri} is no data set any more: its spec.lock.json is gone")
        manifest = Manifest(self._uri, lock.format)
        done = manifest.committed(lock.num_shards)
        if len(self._seen) < len(done):  # extended meanwhile
            self._seen = np.append(self._seen, np.zeros(len(done) - len(self._seen), bool))
        self._read(manifest, done)
        images = sum(
            each.count_records(
                np.flatnonzero(done[each.first_shard : each.shards.stop]) + each.first_shard
            )
            for each in lock.segments
        )
        counts: dict[str, Any] = {
            "shards": int(done.sum()),
            "num_shards": lock.num_shards,
            "images": images,
            "num_images": lock.num_records,
            "looked_at": len(self._history),
            "failed": self._history.total("failed"),
            "reasons": self._count_reasons(),
        }
        return DataSetStatus(**counts, **self._pace(counts, time.time()))

    def _read(self, manifest: Manifest, done: np.ndarray) -> None:
        """Take in entries that were not, of the last shards."""
        known = self._seen | _old(done)
        for entry in manifest.unseen(known):
            if not self._seen[entry["shard"]]:
                self._seen[entry["shard"]] = True
                self._history.add(entry)

    def _pace(self, counts: dict[str, Any], now: float) -> dict[str, Any]:
        history, left = self._history, counts["num_images"] - counts["images"]
        is_done = counts["shards"] == counts["num_shards"]
        if not len(history) or history.span is None:
            state = "done" if is_done else "in progress" if len(history) else "begun"
            nothing = {"rate": None, "window_s": 0.0, "eta_s": None, "last_commit": None}
            return {"state": state, **nothing}
        ends, seconds = history.column("finished_at"), history.column("seconds")
        last = history.span[1]
        recent = np.flatnonzero(ends > last - WINDOW_S)
        window_s = max(WINDOW_S, 3 * float(np.median(seconds[recent])))
        recent = np.flatnonzero(ends > last - window_s)
        window_s = min(window_s, last - float((ends - seconds)[recent].min()))
        rate = float(history.column("rows")[recent].sum()) / max(window_s, 1e-3)
        is_silent = now - last > max(SILENCE_S, 3 * float(seconds[recent].max()))
        state = "done" if is_done else "silent" if is_silent else "in progress"
        return {
            "state": state,
            "rate": rate,
            "window_s": window_s,
            "eta_s": left / rate if state == "in progress" and rate else None,
            "last_commit": last,
            "slowest": [] if is_done else self._slowest(recent),
        }

    def _slowest(self, recent: np.ndarray) -> list[dict[str, Any]]:
        names = ("node", "worker", "shards", "images", "failed", "images_per_s")
        at_work = set(self._history.column("worker")[recent].tolist())
        workers = [each for each in self._history.workers() if each["number"] in at_work]
        slow = sorted(workers, key=lambda each: each["images_per_s"])[:SLOWEST]
        return [{name: each[name] for name in names} for each in slow]

    def _count_reasons(self) -> dict[str, int]:
        shards = self._history.column("shard")[self._history.column("failed") > 0]
        reasons: dict[str, dict[str, Any]] = {}
        for shard in sorted(shards.tolist())[-MAX_FAILED_SHARDS:]:
            for shape, one in self._failures_of(shard).items():
                reason = reasons.setdefault(shape, {"text": one["text"], "count": 0})
                reason["count"] += one["count"]
        most = sorted(reasons.values(), key=lambda one: -one["count"])
        return {one["text"]: one["count"] for one in most}

    def _failures_of(self, shard: int) -> dict[str, Any]:
        if shard not in self._reasons:
            try:
                sheet = contact_sheet.read_failures(self._uri, shard, self._history.suffix)
                self._reasons[shard] = sheet["failures"]
            except dataset_report.BROKEN as error:
                text = f"shard {shard} cannot be read: {error}"[:200]
                self._reasons[shard] = {text: {"text": text, "count": 1}}
        return self._reasons[shard]


def _old(done: np.ndarray) -> np.ndarray:
    """The finished shards whose entries are not looked at, (num_shards,) bool."""
    num_groups = -(-len(done) // GROUP)
    whole = np.zeros(num_groups * GROUP, bool)
    whole[: len(done)] = done
    complete = whole.reshape(num_groups, GROUP).all(axis=1)
    old = np.zeros(num_groups, bool)
    old[np.flatnonzero(complete)[:-MAX_GROUPS]] = True
    skipped = np.repeat(old, GROUP)[: len(done)]
    single = np.flatnonzero(done & ~np.repeat(complete, GROUP)[: len(done)])
    skipped[single[:-MAX_SINGLES]] = True
    return skipped
