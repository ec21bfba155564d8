"""Spans of a request: those of the engine here, and all of them on a real application."""

import asyncio
import json
import urllib.request
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from rayjobs.config import BadInput
from serve.tracing import OTLP, check
from tests.serving import running as applications
from tests.serving.engine.loops import all_of, loaded_once, make_request, running

__all__ = ["loaded_once"]


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr("serve.tracing._tracer", lambda: provider.get_tracer("tests"))
    return exporter


@pytest.mark.model
def test_the_stages_of_a_request(spans: InMemorySpanExporter) -> None:
    parent = trace.SpanContext(7, 8, is_remote=True, trace_flags=trace.TraceFlags(1))

    async def main() -> None:
        async with running() as loop:
            spans.clear()  # of the warm-up
            with trace.use_span(trace.NonRecordingSpan(parent)):
                await all_of(loop, make_request(steps=4))

    asyncio.run(main())
    found = {each.name: each for each in spans.get_finished_spans()}
    assert list(found) == ["prepare", "wait", "denoise", "decode"]
    assert {each.parent.span_id for each in found.values()} == {8}
    assert {each.context.trace_id for each in found.values()} == {7}
    assert [each.attributes["done"] for each in found["denoise"].events] == [1, 2, 3, 4]
    assert found["decode"].attributes == {"outcome": "ok"}
    times = [each.start_time for each in found.values()]
    assert times == sorted(times)


@pytest.mark.parametrize(
    ("exporter", "told"),
    [(OTLP, "pip install"), ("nowhere:at_all", "name a function"), ("odd", "name a function")],
)
def test_an_exporter_that_is_not_there(exporter: str, told: str) -> None:
    with pytest.raises(BadInput, match=told):
        check(exporter)


@pytest.mark.ray
@pytest.mark.slow
def test_a_trace_from_the_caller_to_the_last_step() -> None:

    exporter = "ray.serve._private.tracing_utils:default_tracing_exporter"
    environment = {
        "RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH": exporter,
        "RAY_SERVE_TRACING_SAMPLING_RATIO": "1",
    }
    body = json.dumps({"prompt": "a", "size": "64x64", "num_inference_steps": 2}).encode()
    mine = "4bf92f3577b34da6a3ce929d0e0e4736"
    headers = {"content-type": "application/json", "traceparent": f"00-{mine}-00f067aa0ba902b7-01"}
    config = {"models": [{"name": "starter", "uri": "starter"}]}
    # Ray's sockets have short paths.
    with TemporaryDirectory() as folder:
        environment["RAY_TMPDIR"] = folder
        with applications.running(config, environment=environment) as app:
            url = f"{app.url}/v1/images/generations"
            urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=60).close()
        found = recorded(Path(folder))
    names = {each["name"] for each in found if mine in each["context"]["trace_id"]}
    assert {"read", "prepare", "wait", "denoise", "decode"} <= names
    assert any(name.startswith("proxy") for name in names), names
    assert any(name.startswith("route_to_replica Engine") for name in names), names


def recorded(folder: Path) -> list[dict[str, Any]]:
    """The spans of Ray's own exporter: objects of JSON one after the other."""
    found, decoder = [], json.JSONDecoder()
    for path in folder.rglob("spans/*"):
        text = path.read_text().strip()
        while text:
            value, end = decoder.raw_decode(text)
            found.append(value)
            text = text[end:].lstrip()
    return found
