"""How a job goes, by its folder alone: what is told is true, and little is read for it."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayjobs import status, storage
from rayjobs.cli import main
from rayjobs.dataset.manifest import GROUP, Manifest
from rayjobs.dataset.records import canonical_json
from rayjobs.reports.running import Running, tell
from rayjobs.status import dataset

BEFORE = Path(__file__).parents[1] / "fixtures" / "before_rooms"


def data_set(folder: Path, num_shards: int) -> Manifest:
    """A data set that has a lock for shards of two records, and nothing finished."""
    lock = json.loads((BEFORE / "dataset" / "spec.lock.json").read_text())
    [segment] = lock["segments"]
    segment |= {"num_records": 2 * num_shards, "num_shards": num_shards}
    (folder / "manifest").mkdir(parents=True)
    (folder / "spec.lock.json").write_text(json.dumps(lock))
    return Manifest(str(folder))


def entry(shard: int, finished_at: float, **facts: Any) -> dict[str, Any]:
    return {
        "shard": shard,
        "generation": 0,
        "file": f"data/shard-{shard:08d}.parquet",
        "sha256": f"{shard:064x}",
        "bytes": 10,
        "rows": 2,
        "failed": 0,
        "seconds": 4.0,
        "finished_at": finished_at,
        "worker": "host-1",
        "node": "host",
        "class": "0123456789ab",
        "class_changed": False,
    } | facts


def commit(manifest: Manifest, one: dict[str, Any]) -> None:
    Path(manifest.entry_uri(one["shard"])).write_bytes(canonical_json(one))


def look(uri: str) -> Any:
    return status.watch(uri)()


def test_pace_and_workers_of_the_last_minutes(tmp_path: Path) -> None:
    manifest, now = data_set(tmp_path, 400), time.time()
    assert look(manifest.uri).state == "begun"
    for shard in range(100):  # an hour ago, by a worker that is gone
        commit(manifest, entry(shard, now - 3600 + shard, worker="gone", seconds=1.0))
    for shard in range(100, 160):  # two images every 4 s, of the other worker every 8 s
        slow = {"worker": "slow", "seconds": 8.0} if shard % 3 == 2 else {}
        commit(manifest, entry(shard, now - 4 * (160 - shard), **slow))
    found = look(manifest.uri)
    assert (found.state, found.shards, found.images, found.num_images) == (
        "in progress",
        160,
        320,
        800,
    )
    assert found.rate == pytest.approx(0.5, rel=0.05)
    assert found.eta_s == pytest.approx(480 / found.rate)
    assert [each["worker"] for each in found.slowest] == ["slow", "host-1"]
    assert "160 of 400 (40.00%)" in found.text(manifest.uri)
    for shard in range(100, 160):
        commit(manifest, entry(shard, now - 600 - 4 * (160 - shard)))
    found = look(manifest.uri)
    assert (found.state, found.eta_s) == ("silent", None)
    assert "continues where it stopped" in found.text(manifest.uri)


def test_failures_by_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, now = data_set(tmp_path, 100), time.time()
    for shard in range(40):
        commit(manifest, entry(shard, now, failed=2))
    read: list[int] = []

    def failures(uri: str, shard: int, suffix: str) -> dict[str, Any]:
        read.append(shard)
        if shard == 39:
            raise OSError("gone")
        return {"failures": {"it is … wide": {"text": f"it is {shard} wide", "count": 2}}}

    monkeypatch.setattr(dataset.contact_sheet, "read_failures", failures)
    seen = status.watch(manifest.uri)
    for _ in range(2):  # what is known is not read again
        found = seen()
        assert isinstance(found, status.DataSetStatus)
        assert found.failed == 80
        assert found.reasons == {"it is 24 wide": 30, "shard 39 cannot be read: gone": 1}
    assert sorted(read) == list(range(24, 40))


def test_little_is_read_of_a_large_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a million shards the last ones alone; those that came since the last look once."""
    manifest, now = data_set(tmp_path, 1_000 * GROUP), time.time()
    for group in range(900):
        Path(manifest.compact_uri(group)).touch()  # an empty one is damaged, if it is read
    entries = {"compact": 0, "single": 0}

    def read_compact(self: Manifest, group: int) -> dict[int, Any]:
        entries["compact"] += 1
        return {n: entry(n, now - 5) for n in range(group * GROUP, (group + 1) * GROUP, 100)}

    def read_entry(self: Manifest, shard: int) -> dict[str, Any]:
        entries["single"] += 1
        return entry(shard, now)

    monkeypatch.setattr(Manifest, "_read_compact", read_compact)
    monkeypatch.setattr(Manifest, "_read_entry", read_entry)
    for shard in range(900 * GROUP, 900 * GROUP + 30):
        Path(manifest.entry_uri(shard)).touch()
    seen = status.watch(manifest.uri)
    found = seen()
    assert isinstance(found, status.DataSetStatus)
    assert found.shards == 900 * GROUP + 30
    assert entries == {"compact": dataset.MAX_GROUPS, "single": 30}
    Path(manifest.entry_uri(901 * GROUP)).touch()
    seen()
    assert entries["single"] == 31


def test_old_shards() -> None:
    done = np.zeros(100 * GROUP + 500, bool)
    done[: 90 * GROUP] = True
    done[95 * GROUP : 95 * GROUP + 10] = True
    old = dataset._old(done)
    assert old.sum() == (90 - dataset.MAX_GROUPS) * GROUP
    assert not old[(90 - dataset.MAX_GROUPS) * GROUP :].any()


def test_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = str(tmp_path / "run")
    shutil.copytree(BEFORE / "run-unfinished", uri)
    found = look(uri)
    assert (found.state, found.step, found.num_steps, found.checkpoints) == ("begun", 3, 6, [3])
    losses = [0.04469897225499153, 0.0953153669834137, 0.21029161661863327]
    assert found.loss == pytest.approx(sum(losses) / 3)
    page = Path(uri, "index.html")
    running = Running(time.time(), time.time() + 10, 1, 3, 0.5, "steps")
    page.write_text(f"<body>{tell(running)}</body>")
    found = look(uri)
    assert found.state == "in progress"
    assert "1 of 3 steps of this run, 0.5 steps/s, 4.0 s left" in found.text(uri)
    page.write_text(tell(Running(time.time() - 3600, time.time(), 1, 3, 0.5, "steps")))
    assert look(uri).state == "silent"
    page.write_text(tell(Running(time.time() - 3600, None, 1, 3, 0.5, "steps")))
    assert look(uri).state == "interrupted"
    rows = [{"step": n, "loss": 1.0, "validation_loss": abs(n - 9_000)} for n in range(10_000)]
    lines = [json.dumps(row) for row in rows]
    Path(uri, "metrics.jsonl").write_text("\n".join(lines) + "\n")
    found = look(uri)
    assert (found.step, found.loss) == (9_999, 1.0)
    assert found.best == {"step": 9_000, "name": "loss at fixed noise", "value": 0}
    score = {"step": 4, "score": 0.7, "metrics": {}, "grids": {}}
    storage.write_bytes(f"{uri}/validation/step-00000004.json", json.dumps(score).encode())
    assert look(uri).best == {"step": 4, "name": "joint score", "value": 0.7}


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = str(BEFORE / "dataset")
    assert main(["status", done, "--watch"]) == 0  # which ends, since it is done
    assert "done" in capsys.readouterr().out
    assert main(["status", str(BEFORE / "runs" / "sks"), "--json", "--watch"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["kind"], told["state"], told["exported_step"]) == ("training run", "done", 6)
    assert main(["status", str(tmp_path)]) == 2
    assert "neither a data set" in capsys.readouterr().err
