"""What the server counts, what the ingress makes of it, and what the dashboard shows."""

import json
import re
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

import serve
from serve.metrics import PREFIX, EngineMetrics, IngressMetrics, merge
from serve.protocol import ImagesRequest

BOARD = Path(serve.__file__).with_name("grafana.json")
METRIC = re.compile(rf"({PREFIX}_\w+)(?:{{([^}}]*)}})?")
MATCHER = re.compile(r"(\w+)\s*(?:=~|!~|!=|=)")
GROUPING = re.compile(r"\bby \(([^)]*)\)")
LEGEND = re.compile(r"{{\s*(\w+)\s*}}")
VARIABLE = re.compile(r"\$\{?(\w+)")


@pytest.fixture
def board() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(BOARD.read_text())
    return found


def counted(times: int = 1) -> EngineMetrics:
    """Everything that can happen to a replica, so many times."""
    found = EngineMetrics()
    request = ImagesRequest(id="1", caller="me", model="starter", prompt="a cat")
    for _ in range(times):
        found.request_finished(request, "ok", 0.5)
        found.request_finished(request, "busy", 0.001)
        found.started(0.02)
        found.stepped("folder/starter", 3, 0.2)
        found.made("folder/starter")
        found.cancelled(2)
        found.expired()
        found.model_loaded(SimpleNamespace(uri="folder/starter"), 4.0)
        found.set_load(1.5 * times, times)
        found.lag(-0.001)
    return found


def everything() -> str:
    return merge({"a": counted().text(), "ingress": IngressMetrics().text()})


def families(text: str) -> list[Metric]:
    return list(text_string_to_metric_families(text))


def samples(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    found = [sample for family in families(text) for sample in family.samples]
    by_labels = {(each.name, frozenset(each.labels.items())): each.value for each in found}
    assert len(by_labels) == len(found)
    return by_labels


def labels_of_metrics() -> dict[str, set[str]]:
    """The labels of each metric, by its name in PromQL."""
    found: dict[str, set[str]] = {}
    for name, labels in samples(everything()):
        found.setdefault(name, set()).update(label for label, _ in labels)
    return found


def panels(board: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows too, and what is folded into them."""
    return [each for top in board["panels"] for each in (top, *top.get("panels", ()))]


def targets(board: dict[str, Any]) -> list[dict[str, Any]]:
    return [target for panel in panels(board) for target in panel.get("targets", ())]


def test_all_that_is_exported_is_counted_here() -> None:
    assert all(family.samples for family in families(counted().text()))


def test_merged_replicas_keep_their_values() -> None:
    texts = {"a": counted().text(), "b": counted(3).text(), "new": EngineMetrics().text()}
    merged = merge(texts)
    expected = {
        (name, labels | {("replica", replica)}): value
        for replica, text in texts.items()
        for (name, labels), value in samples(text).items()
    }
    assert samples(merged) == expected
    ok = frozenset({"model": "starter", "outcome": "ok", "replica": "b"}.items())
    assert expected[f"{PREFIX}_requests_total", ok] == 3
    bucket = frozenset({"model": "folder/starter", "le": "3.0", "replica": "b"}.items())
    assert expected[f"{PREFIX}_rows_per_step_bucket", bucket] == 3
    assert expected[f"{PREFIX}_rows", frozenset({("replica", "b")})] == 3


def test_merged_families_are_told_once_as_they_were() -> None:
    def told(text: str) -> list[str]:
        return [line for line in text.splitlines() if line.startswith("#")]

    one = counted().text()
    assert told(merge({"a": one, "b": one})) == told(one)
    assert merge({}) == ""


def test_the_dashboard_asks_for_what_there_is(board: dict[str, Any]) -> None:
    known = labels_of_metrics()
    for target in targets(board):
        selected = METRIC.findall(target["expr"])
        assert selected, target
        for name, matchers in selected:
            assert name in known, target
            assert set(MATCHER.findall(matchers)) <= known[name], target
        labels = set[str]().union(*(known[name] for name, _ in selected))
        for group in GROUPING.findall(target["expr"]):
            assert set(group.split(", ")) <= labels, target


def test_the_dashboard_shows_all_there_is(board: dict[str, Any]) -> None:
    asked = {name for each in targets(board) for name, _ in METRIC.findall(each["expr"])}
    for family in families(everything()):
        assert asked & {sample.name for sample in family.samples}, family.name


def test_the_dashboard_s_variables_are_there(board: dict[str, Any]) -> None:
    known = labels_of_metrics()
    variables = {each["name"]: each for each in board["templating"]["list"]}
    assert {"DS", "model", "replica"} <= variables.keys()
    assert variables["DS"]["type"] == "datasource"
    for each in variables.values():
        if each["type"] == "query":
            pattern = r"label_values\((\w+), (\w+)\)"
            found = re.fullmatch(pattern, each["query"]["query"])
            assert found is not None
            assert found[2] in known[found[1]]
            assert each["definition"] == each["query"]["query"]
    used = {name for each in targets(board) for name in VARIABLE.findall(json.dumps(each))}
    assert used - {"__rate_interval"} == variables.keys()


def test_legends_name_labels_that_are_left(board: dict[str, Any]) -> None:
    for target in targets(board):
        groups = GROUPING.findall(target["expr"])
        left = {label for group in groups for label in group.split(", ")}
        assert set(LEGEND.findall(target["legendFormat"])) <= left, target


def test_every_panel_has_its_place_and_says_what_to_do(board: dict[str, Any]) -> None:
    found = panels(board)
    ids = [each["id"] for each in found]
    assert len(set(ids)) == len(ids)
    titles = [each["title"] for each in found]
    assert len(set(titles)) == len(titles)
    for panel in found:
        if panel["type"] != "row":
            assert panel["description"]
            refs = [target["refId"] for target in panel["targets"]]
            assert len(set(refs)) == len(refs)
    for one, other in combinations([each["gridPos"] for each in found], 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or below, (one, other)
