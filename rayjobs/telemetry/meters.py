"""Counters and gauges of a job's processes.

Owns their names and the labels' bounds. `Meters` counts nothing, for what runs outside of Ray.
"""

import re
from typing import Any

PREFIX = "rayjobs_"
COUNTERS = {
    "images": "Images of finished records, failed ones included",
    "failed_images": "Images that failed, by reason",
    "steps": "Denoising or optimizer steps",
    "step_seconds": "Time in steps",
    "unet_seconds": "Of the time in steps that in UNet and samplers, as its thread sees it",
    "side_seconds": "Of the time in steps that for prompts and the autoencoder, as its thread sees",
    "waiting_seconds": "Time between steps: for storage, encoding of pictures, or work",
    "commits": "Shards or checkpoints committed",
    "commit_seconds": "Time to commit them, beside the steps unless storage is slow",
    "checkpoint_stall_seconds": "Time in which training waited for checkpoints",
    "storage_retries": "Calls to storage that were made again",
    "restarts": "Shards that were begun again after their worker died; starts of a training",
}
GAUGES = {
    "loss": "Of the last optimizer step",
    "step": "The last optimizer step",
}
REASONS = 32
"""Different reasons that one process tells; the rest is `other`."""
LONGEST = 80


class Meters:
    """Takes what is counted; this one drops it."""

    def add(self, name: str, amount: float = 1.0, reason: str | None = None) -> None:
        """Count so much more; `reason` is that of a failure."""

    def set(self, name: str, value: float) -> None:
        """What is the case now."""


class RayMeters(Meters):
    """Those of a process of Ray's that works at a job, whose output is at `job`."""

    def __init__(self, job: str):
        from ray.util.metrics import Counter, Gauge

        self._labels = {"job": job}
        self._reasons: set[str] = set()
        self._counters: dict[str, Any] = {
            name: Counter(f"{PREFIX}{name}", about, tag_keys=labels_of(name))
            for name, about in COUNTERS.items()
        }
        self._gauges: dict[str, Any] = {
            name: Gauge(f"{PREFIX}{name}", about, tag_keys=labels_of(name))
            for name, about in GAUGES.items()
        }

    def add(self, name: str, amount: float = 1.0, reason: str | None = None) -> None:
        if amount > 0:
            labels = {} if reason is None else {"reason": self._bounded(reason)}
            self._counters[name].inc(amount, self._labels | labels)

    def set(self, name: str, value: float) -> None:
        self._gauges[name].set(value, self._labels)

    def _bounded(self, reason: str) -> str:
        """A reason without what differs from record to record."""
        shape = re.sub(r"'[^']*'|\"[^\"]*\"|\S+://\S+|\S+\.\w{3,4}\b|\d+", "…", reason)[:LONGEST]
        if shape in self._reasons or len(self._reasons) < REASONS:
            self._reasons.add(shape)
            return shape
        return "other"


class Totals:
    """Counts up to totals that somebody else keeps."""

    def __init__(self, meters: Meters):
        self._meters = meters
        self._told: dict[str, float] = {}

    def tell(self, **totals: float) -> None:
        for name, total in totals.items():
            more = total - self._told.get(name, 0.0)
            if more > 0:
                self._meters.add(name, more)
                self._told[name] = total


def labels_of(name: str) -> tuple[str, ...]:
    return ("job", "reason") if name == "failed_images" else ("job",)
