"""OpenTelemetry spans of a request, below those that Ray Serve makes for its proxy and replicas.

Owns the stages' names and where spans are sent to. Without `tracing_config` in the file nothing is
recorded. Knows nothing of how requests are served.
"""

import importlib
import time
from contextlib import AbstractContextManager
from typing import Any

from opentelemetry import context, trace

from rayjobs.config import BadInput

OTLP = "serve.tracing:otlp"
OTLP_MODULE = "opentelemetry.exporter.otlp.proto.http.trace_exporter"


def span(name: str) -> AbstractContextManager[Any]:
    """A span around what is done in this context."""
    return _tracer().start_as_current_span(name)


class Stages:
    """What a request goes through, one span after the other; any thread may say where it is."""

    def __init__(self, first: str):
        self._parent = context.get_current()
        self._span: trace.Span | None = None
        self.name = ""
        self.enter(first)

    def enter(self, name: str, ago_s: float = 0.0) -> None:
        """A stage begins, or began so long ago, and the one before ends."""
        if name == self.name:
            return
        at_ns = time.time_ns() - round(1e9 * ago_s)
        before, self.name = self._span, name
        self._span = _tracer().start_span(name, self._parent, start_time=at_ns)
        if before is not None:
            before.end(at_ns)

    def note(self, event: str, **attributes: int | str) -> None:
        """Something happens within the stage."""
        if self._span is not None:
            self._span.add_event(event, attributes)

    def end(self, outcome: str) -> None:
        if self._span is not None:
            self._span.set_attribute("outcome", outcome)
            self._span.end()


def otlp() -> list[Any]:
    """Ray's exporter function for a collector: OTEL_EXPORTER_OTLP_ENDPOINT says where it is."""
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    return [BatchSpanProcessor(importlib.import_module(OTLP_MODULE).OTLPSpanExporter())]


def check(exporter: str) -> None:
    """Raise BadInput for an exporter function that cannot be called here."""
    module, _, name = exporter.replace(":", ".").rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
        if exporter == OTLP:
            importlib.import_module(OTLP_MODULE)
    except (ImportError, AttributeError, ValueError) as error:
        way_out = "pip install 'rayjobs[tracing]'" if exporter == OTLP else "name a function"
        raise BadInput(
            f"tracing_config.exporter_import_path {exporter!r} cannot be used ({error}); {way_out}"
        ) from None
    if not callable(found):
        raise BadInput(f"tracing_config.exporter_import_path {exporter!r} is no function")


def _tracer() -> trace.Tracer:
    return trace.get_tracer("rayjobs.serve")
