"""Prometheus metrics of the engine replicas, and of the ingress replica that is asked.

Owns the metrics' names. Each replica has a registry of its own, and the ingress merges their texts,
so that `/metrics` of the API needs neither Ray's metrics agent nor its port. `ray.serve.metrics`
would not keep these names: it prefixes them with `ray_`, adds labels, and exports through the agent
on every node. Knows nothing of how requests are served.
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

from serve.protocol import ImagesRequest

SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
STEP_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
PREFIX = "rayjobs_serve"

disable_created_metrics()


def merge(texts: dict[str, str]) -> str:
    """The metrics of several replicas as one text, with the replica's name as a label."""
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
    """Metrics of one engine replica; any thread may update them."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = self._counter(
            "requests", "Requests answered, by outcome", "model", "outcome"
        )
        self._seconds = self._histogram(
            "request_seconds", "From arrival to the last event", SECONDS, "model"
        )
        self._queue = self._histogram("queue_seconds", "From arrival to the first step", SECONDS)
        self._rows = self._histogram("rows_per_step", "Images in one step", ROWS, "model")
        self._steps = self._histogram("step_seconds", "Duration of a step", STEP_SECONDS, "model")
        self._images = self._counter("images", "Images made", "model")
        self._cancelled = self._counter("cancelled_rows", "Images whose caller disconnected")
        self._deadlines = self._counter("deadlines", "Requests that reached their deadline")
        self._loads = self._counter("model_loads", "Models loaded", "model")
        self._load_s = self._histogram("model_load_seconds", "Loading a model", SECONDS)
        self._pending = self._gauge("pending_seconds", "Seconds of work that waits")
        self._active = self._gauge("rows", "Images in progress or waiting")
        self._lag = self._histogram(
            "event_loop_lag_seconds", "Delay of the event loop", STEP_SECONDS
        )

    def request_finished(self, request: ImagesRequest, outcome: str, seconds: float) -> None:
        self._requests.labels(request.model, outcome).inc()
        self._seconds.labels(request.model).observe(seconds)

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

    def model_loaded(self, weights: object, seconds: float) -> None:
        self._loads.labels(getattr(weights, "uri", "")).inc()
        self._load_s.observe(seconds)

    def set_load(self, pending_s: float, rows: int) -> None:
        self._pending.set(pending_s)
        self._active.set(rows)

    def lag(self, seconds: float) -> None:
        self._lag.observe(max(0.0, seconds))

    def text(self) -> str:
        return generate_latest(self.registry).decode()

    def _counter(self, name: str, help_text: str, *labels: str) -> Counter:
        return Counter(f"{PREFIX}_{name}", help_text, labels, registry=self.registry)

    def _gauge(self, name: str, help_text: str) -> Gauge:
        return Gauge(f"{PREFIX}_{name}", help_text, registry=self.registry)

    def _histogram(
        self, name: str, help_text: str, buckets: Iterable[float], *labels: str
    ) -> Histogram:
        return Histogram(
            f"{PREFIX}_{name}", help_text, labels, buckets=tuple(buckets), registry=self.registry
        )


class IngressMetrics:
    """Metrics of one ingress replica."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._shared = Gauge(
            f"{PREFIX}_limits_shared",
            "1 where keys' limits hold over all ingress replicas, 0 where each counts for itself",
            registry=self.registry,
        )

    def set_shared(self, is_shared: bool) -> None:
        self._shared.set(is_shared)

    def text(self) -> str:
        return generate_latest(self.registry).decode()
