"""Checkpoints count only when whole, and pruning leaves no more than was asked."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from rayjobs import storage
from rayjobs.dreambooth.checkpoints import Checkpoint, Checkpoints

FILES = {"adapter.safetensors": b"weights" * 1000, "optimizer/rank-0.pt": b"moments" * 2000}


@pytest.fixture(params=["local", "s3"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A run's folder of checkpoints, not made yet: on this machine, then in a bucket."""
    if request.param == "local":
        return str(tmp_path / "run" / "checkpoints")
    return storage.join(request.getfixturevalue("bucket"), "run", "checkpoints")


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    found = {}
    for number, (name, data) in enumerate(FILES.items()):
        found[name] = tmp_path / f"made-{number}"
        found[name].write_bytes(data)
    return found


def put(checkpoints: Checkpoints, step: int, files: dict[str, Path]) -> dict[str, dict[str, Any]]:
    return {name: checkpoints.put(step, name, path) for name, path in files.items()}


def save(checkpoints: Checkpoints, step: int, files: dict[str, Path]) -> None:
    checkpoints.commit(step, put(checkpoints, step, files), {"loss": step / 10})


def steps(found: list[Checkpoint]) -> list[int]:
    return [checkpoint.step for checkpoint in found]


def test_where_nothing_is_there_is_no_checkpoint(uri: str) -> None:
    checkpoints = Checkpoints(uri)
    assert checkpoints.list() == []
    assert checkpoints.latest() is None
    checkpoints.prune({1})


def test_what_is_fetched_is_what_was_saved(uri: str, files: dict[str, Path]) -> None:
    checkpoints = Checkpoints(uri)
    for step in (100, 20, 3):
        save(checkpoints, step, files)
    assert steps(checkpoints.list()) == [3, 20, 100]
    latest = Checkpoints(uri).latest()
    assert latest is not None
    assert (latest.step, latest.facts) == (100, {"loss": 10.0})
    assert {name: entry["bytes"] for name, entry in latest.files.items()} == {
        name: len(data) for name, data in FILES.items()
    }
    folder = checkpoints.fetch(latest)
    assert folder is not None
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    fetched = {name: (folder / name).read_bytes() for name in names}
    shutil.rmtree(folder)
    assert fetched == FILES


def test_without_its_note_it_is_no_checkpoint(uri: str, files: dict[str, Path]) -> None:
    checkpoints = Checkpoints(uri)
    save(checkpoints, 1, files)
    put(checkpoints, 2, files)
    assert steps(checkpoints.list()) == [1]
    latest = checkpoints.latest()
    assert latest is not None
    assert latest.step == 1


@pytest.mark.parametrize("hurt", ["cut", "changed", "gone"])
def test_what_is_not_whole_is_passed_over(uri: str, hurt: str, files: dict[str, Path]) -> None:
    checkpoints = Checkpoints(uri)
    for step in (1, 2, 3):
        save(checkpoints, step, files)
    for step, name in ((2, "adapter.safetensors"), (3, "optimizer/rank-0.pt")):
        file, data = storage.join(uri, f"step-{step:08d}", name), FILES[name]
        half = len(data) // 2
        if hurt == "gone":
            storage.remove(file)
        else:
            rest = b"" if hurt == "cut" else b"?" + data[half + 1 :]
            storage.write_bytes(file, data[:half] + rest)
    assert steps(checkpoints.list()) == [1, 2, 3]
    latest = checkpoints.latest()
    assert latest is not None
    assert latest.step == 1
    storage.remove(storage.join(uri, "step-00000001", "adapter.safetensors"))
    assert checkpoints.latest() is None


def test_a_checkpoint_may_be_saved_again(uri: str, files: dict[str, Path]) -> None:
    checkpoints = Checkpoints(uri)
    put(checkpoints, 1, files)
    save(checkpoints, 1, files)
    files["adapter.safetensors"].write_bytes(b"other")
    save(checkpoints, 1, files)
    latest = checkpoints.latest()
    assert latest is not None
    assert latest.files["adapter.safetensors"]["bytes"] == 5


def test_pruning_leaves_what_was_asked(uri: str, files: dict[str, Path]) -> None:
    """Half of an older one is an orphan; half of a newer one is on its way."""
    checkpoints = Checkpoints(uri)
    for step in (1, 2, 4):
        save(checkpoints, step, files)
    put(checkpoints, 3, files)
    put(checkpoints, 5, files)
    storage.write_bytes(storage.join(uri, "notes", "mine.txt"), b"stays")
    checkpoints.prune({2, 4, 99})
    assert steps(checkpoints.list()) == [2, 4]
    left = [f"step-{step:08d}/{name}" for step in (2, 4, 5) for name in FILES]
    assert storage.list_files(uri) == sorted(
        [*left, "step-00000002.json", "step-00000004.json", "notes/mine.txt"]
    )
    latest = checkpoints.latest()
    assert latest is not None
    assert latest.step == 4
    save(checkpoints, 6, files)
    checkpoints.prune({6})
    assert [name for name in storage.list_files(uri) if "00000006" not in name] == [
        "notes/mine.txt"
    ]


def test_looking_for_the_latest_leaves_nothing_behind(
    uri: str, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(uri)
    for step in (1, 2):
        save(checkpoints, step, files)
    storage.write_bytes(storage.join(uri, "step-00000002", "adapter.safetensors"), b"cut")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    assert checkpoints.latest() is not None
    assert list(scratch.iterdir()) == []
