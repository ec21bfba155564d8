"""A job costs driver and storage little, however large; and the benchmark that says so runs."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.scale import __main__ as scale
from benchmarks.scale import driver, schedule, start
from rayjobs import storage
from rayjobs.dataset.gathering import Gathering
from rayjobs.dataset.manifest import GROUP, Manifest
from rayjobs.progress import Counter as Progress
from rayjobs.progress import Reporter, report_every_s
from rayjobs.reports.history import Activity, History
from rayjobs.storage import ranges


def test_the_driver_reads_nothing_that_it_was_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = Manifest(str(tmp_path))
    told = [driver.entry(manifest, shard, 64, float(shard), shard % 8) for shard in range(GROUP)]
    before = told[:3]  # of an earlier run
    for one in before:
        facts = {name: value for name, value in one.items() if name != "made"}
        storage.write_bytes(manifest.entry_uri(one["shard"]), json.dumps(facts).encode())
    done = manifest.committed(GROUP + 5)
    read, asked = storage.read_bytes, Counter[str]()
    monkeypatch.setattr(storage, "read_bytes", lambda uri: asked.update(["read"]) or read(uri))
    monkeypatch.setattr(storage, "list_files", lambda uri: pytest.fail("listed"))
    gathering = Gathering(manifest, done)
    for one in reversed(told[3:]):
        gathering.add(one)
    monkeypatch.undo()
    assert asked == {"read": len(before)}
    assert storage.list_files(str(tmp_path / "manifest")) == ["compact-00000000.parquet"]
    assert [one | {"made": True} for one in manifest.entries()] == told


def test_progress_is_one_call_in_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []

    class Actor:
        class add:
            remote = staticmethod(lambda *counts: calls.append(counts))

    now = [100.0]
    monkeypatch.setattr("rayjobs.progress.time.monotonic", lambda: now[0])
    reporter = Reporter(Actor, report_every_s(8))
    for _ in range(1000):
        now[0] += 0.01
        reporter.add(1, 0)
    reporter.add(1, 1)
    reporter.flush()
    assert len(calls) <= 12
    counter = Progress()
    for counts in calls:
        counter.add(*counts)
    assert counter.read()[0] == 1001
    assert counter.notes["failed"] == 1
    assert 1024 / report_every_s(1024) <= 100


def test_activity_is_that_of_the_whole_history() -> None:
    rng = np.random.default_rng(0)
    history, activity = History(), Activity()
    for shard, end in enumerate(rng.uniform(0, 400, 200)):
        facts: dict[str, Any] = driver.entry(Manifest("x"), shard, 3, float(end), 0)
        facts["seconds"] = float(rng.uniform(0, 3))
        history.add(facts)
        activity.add(facts)
    assert history.pauses
    assert activity.active_s == pytest.approx(history.active_s)
    assert (activity.rows, activity.rate) == (600, pytest.approx(history.rate))


def test_blocks_end_small_and_no_shard_is_lost_with_its_worker() -> None:
    run = schedule.Schedule(5000, 16, lost_per_hour=1.0)
    blocks = [done.block for done in run.run()]
    assert blocks[-1].size == 1
    assert run.wasted_s > 0
    assert sum(block.size for block in blocks) <= 5000
    calm = [done.block for done in schedule.Schedule(5000, 16).run()]
    assert sorted(n for b in calm for n in range(b.start, b.start + b.size)) == list(range(5000))
    assert schedule.tail(5000, 16, 0)["idle_share"] < 0.05


def test_nodes_that_start_at_once_are_refused_and_come_through(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = start.start(64, 1)
    assert (found["refused"], found["gave_up"]) == (0, 0)
    monkeypatch.setattr("benchmarks.scale.figures.READS_PER_S", 350)
    found = start.start(64, 1)
    assert found["refused"] > 0
    assert (found["gave_up"], found["total_s"] < 180) == (0, True)
    monkeypatch.setattr(ranges, "RANGE_BYTES", 16 << 20)
    monkeypatch.setattr(ranges, "TRIES", 6)
    assert start.start(64, 1)["gave_up"] > 0


@pytest.mark.model
def test_the_benchmark_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = tmp_path / "scale.json"
    parts = ["requests", "driver", "start", "tail"]
    scale.main(["--images", "6400", "--gpus", "8", "--parts", *parts, "--json", str(result)])
    found = json.loads(result.read_text())
    assert found.keys() == {"figures", *parts}
    per_shard = found["requests"]["a worker, for each shard"]
    assert sum(per_shard.values()) <= 9, per_shard
    assert sum(found["requests"]["the driver, for a thousand shards"].values()) == 2
    assert found["driver"]["runs"][0]["shards"] == 100
    assert "| 6,400 | 8 |" in capsys.readouterr().out
