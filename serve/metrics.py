"""What an operator wants to know, in Prometheus' words.

Owns the metrics' names. Each process has its own registry; the ingress collects them. Knows nothing
of how requests are served.
"""

from collections.abc import Iterable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from serve.protocol import Ask

SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
STEP_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
PREFIX = "rayjobs_serve"

disable_created_metrics()


def merge(texts: dict[str, str]) -> str:
    """The metrics of several replicas as one text, each with its replica's name as a label."""
    families: dict[str, Metric] = {}
    for replica, text in texts.items():
        for family in text_string_to_metric_families(text):
            merged = families.setdefault(
                family.name, Metric(family.name, family.documentation, family.type)
            )
            for sample in family.samples:
                labels = {**sample.labels, "replica": replica}
                merged.add_sample(sample.name, labels, sample.value)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Families(list(families.values())))
    return generate_latest(registry).decode()


class _Families(Collector):
    def __init__(self, families: list[Metric]):
        self._families = families

    def collect(self) -> list[Metric]:
        return self._families


class EngineMetrics:
    """Of one engine replica. Counters are given by any thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._asks = self._counter("requests", "Asks answered, by their end", "model", "outcome")
        self._seconds = self._histogram("request_seconds", "From ask to end", SECONDS, "model")
        self._queue = self._histogram("queue_seconds", "From ask to first step", SECONDS)
        self._rows = self._histogram("rows_per_step", "Images that shared a step", ROWS, "model")
        self._steps = self._histogram("step_seconds", "One step", STEP_SECONDS, "model")
        self._images = self._counter("images", "Images made", "model")
        self._cancelled = self._counter("cancelled_rows", "Rows whose caller has left")
        self._deadlines = self._counter("deadlines", "Asks that came to their deadline")
        self._loads = self._counter("model_loads", "Models loaded", "model")
        self._load_s = self._histogram("model_load_seconds", "Loading a model", SECONDS)
        self._pending = self._gauge("pending_seconds", "Work that waits, in seconds")
        self._active = self._gauge("rows", "Images that are made or wait now")
        self._lag = self._histogram("event_loop_lag_seconds", "Lateness of events", STEP_SECONDS)

    def answered(self, ask: Ask, outcome: str, seconds: float) -> None:
        self._asks.labels(ask.model, outcome).inc()
        self._seconds.labels(ask.model).observe(seconds)

    def started(self, seconds: float) -> None:
        self._queue.observe(seconds)

    def stepped(self, model: str, rows: int, seconds: float) -> None:
        self._rows.labels(model).observe(rows)
        self._steps.labels(model).observe(seconds)

    def made(self, model: str) -> None:
        self._images.labels(model).inc()

    def cancelled(self, rows: int) -> None:
        self._cancelled.inc(rows)

    def expired(self) -> None:
        self._deadlines.inc()

    def saw_load(self, weights: object, seconds: float) -> None:
        self._loads.labels(getattr(weights, "uri", "")).inc()
        self._load_s.observe(seconds)

    def state(self, pending_s: float, rows: int) -> None:
        self._pending.set(pending_s)
        self._active.set(rows)

    def lag(self, seconds: float) -> None:
        self._lag.observe(max(0.0, seconds))

    def text(self) -> str:
        return generate_latest(self.registry).decode()

    def _counter(self, name: str, told: str, *labels: str) -> Counter:
        return Counter(f"{PREFIX}_{name}", told, labels, registry=self.registry)

    def _gauge(self, name: str, told: str) -> Gauge:
        return Gauge(f"{PREFIX}_{name}", told, registry=self.registry)

    def _histogram(self, name: str, told: str, buckets: Iterable[float], *labels: str) -> Histogram:
        return Histogram(
            f"{PREFIX}_{name}", told, labels, buckets=tuple(buckets), registry=self.registry
        )
