"""What jobs count, and what the dashboard shows of it."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rayjobs.telemetry import meters
from rayjobs.telemetry.meters import COUNTERS, GAUGES, Meters, RayMeters, Totals

BOARD = Path(__file__).parents[2] / "deploy" / "grafana" / "jobs.json"
METRIC = re.compile(rf"ray_{meters.PREFIX}(\w+)")


class Recorded(Meters):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.reasons: list[str] = []

    def add(self, name: str, amount: float = 1.0, reason: str | None = None) -> None:
        assert name in COUNTERS
        assert (reason is not None) == ("reason" in meters.labels_of(name))
        self.counts[name] += amount  # ty: ignore[unsupported-operator]
        self.reasons += [reason] if reason else []


def test_totals_are_counted_up_to() -> None:
    recorded = Recorded()
    totals = Totals(recorded)
    for total in (2.0, 2.0, 1.5, 5.0):
        totals.tell(step_seconds=total)
    assert recorded.counts["step_seconds"] == 5.0


def test_reasons_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A label with a value for each record would be the end of a Prometheus server."""
    ray_meters = RayMeters("out")
    shape = ray_meters._bounded
    first = shape("init image s3://bucket/1.png cannot be read: it is 12 x 9, not 'png'")
    assert first == shape("init image s3://other/2.png cannot be read: it is 7 x 10, not 'gif'")
    told = {shape(f"reason {'x' * number}") for number in range(100)}
    assert len(told) == meters.REASONS
    assert "other" in told
    assert max(map(len, told)) <= meters.LONGEST


def test_the_dashboard_shows_what_is_counted() -> None:
    board: dict[str, Any] = json.loads(BOARD.read_text())
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    expressions = [target["expr"] for panel in panels for target in panel["targets"]]
    found = {name for text in expressions for name in METRIC.findall(text)}
    known = {f"{name}_total" for name in COUNTERS} | GAUGES.keys()
    assert found == known
    assert all(panel["title"] and panel["description"] for panel in panels)
    for text in expressions:
        assert text.count("(") == text.count(")"), text
        assert 'job=~"$job"' in text, text
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
