"""What was compiled is kept for the next process, and nothing is where a model is not compiled."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rayjobs.diffusion.model import ModelOptions
from rayjobs.diffusion.modules import artifacts
from rayjobs.models.warming import warm


class Engine:
    """Warms by noting it."""

    def __init__(self, **options: Any):
        part = SimpleNamespace(config={"width": 4}, dtype=torch.float32)
        held = ModelOptions(device="cpu", **options)
        compiled = None if held.compile == "no" else object()
        self.model: Any = SimpleNamespace(
            compiled=compiled, options=held, unet=part, vae=part, dtype=part.dtype, device="cpu"
        )
        self.sizes: list[Any] = []

    def warm(self, sizes: Any) -> None:
        self.sizes.append(sizes)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What was taken from the folder; a process gives b"code"."""
    taken: list[bytes] = []
    monkeypatch.setattr(artifacts, "take", taken.append)
    monkeypatch.setattr(artifacts, "give", lambda: b"code")
    return taken


def test_the_next_process_takes_what_the_first_one_kept(
    tmp_path: Path, taken: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYJOBS_CACHE", str(tmp_path / "cache"))
    for uri, folder in ((str(tmp_path / "mine"), "mine"), (None, "cache/compiled")):
        taken.clear()
        engines = [Engine(compile="full") for _ in range(2)]
        for engine in engines:
            warm(engine, uri, [(64, 64)])  # type: ignore[arg-type]
            assert engine.sizes == [[(64, 64)]]
        assert taken == [b"code"]
        (file,) = (tmp_path / folder).iterdir()
        assert file.read_bytes() == b"code"


def test_other_code_has_another_name(tmp_path: Path, taken: list[bytes]) -> None:
    engines = [Engine(compile=how) for how in ("full", "blocks")]
    engines += [Engine(compile="full", attention="math"), Engine(compile="full")]
    engines[-1].model.unet = SimpleNamespace(config={"width": 8})
    for engine in engines:
        warm(engine, str(tmp_path))  # type: ignore[arg-type]
    warm(engines[0], str(tmp_path), [(64, 64)])  # type: ignore[arg-type]
    assert (len(list(tmp_path.iterdir())), taken) == (5, [])


def test_a_model_that_is_not_compiled_is_left_alone(tmp_path: Path, taken: list[bytes]) -> None:
    engine = Engine()
    warm(engine, str(tmp_path))  # type: ignore[arg-type]
    assert (engine.sizes, list(tmp_path.iterdir()), taken) == ([], [], [])


def test_what_cannot_be_read_or_kept_costs_only_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifacts, "give", lambda: b"code")
    engine = Engine(compile="full")
    place = tmp_path / f"{artifacts.identify(engine.model, [(64, 64)])}.bin"
    place.write_bytes(b"damaged")
    warm(engine, str(tmp_path), [(64, 64)])  # type: ignore[arg-type]
    assert place.read_bytes() == b"code"
    (tmp_path / "file").write_bytes(b"")
    warm(engine, str(tmp_path / "file"))  # type: ignore[arg-type]
    assert len(engine.sizes) == 2
    assert [
        record.getMessage().split(": ")[0].split(", ", 1)[1]
        for record in caplog.records
        if record.name == "rayjobs"
    ] == [
        "what was compiled before, is not used",
        "what was compiled before, is not used",
        "what was compiled, is not kept",
    ]
