"""Every program under examples/ runs as a program, in this process and its cluster."""

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
# Ray Train and Ray Data read deprecated switches, Lightning deprecated parts of torch.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
DATASET = ROOT / "tests" / "fixtures" / "before_rooms" / "tuned"


class Example:
    """A program of examples/, run in an empty folder."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
        self.folder, self._monkeypatch, self._capsys = folder, monkeypatch, capsys
        monkeypatch.chdir(folder)

    def run(self, name: str, *arguments: str) -> str:
        """What it prints."""
        self._monkeypatch.setattr(sys, "argv", [name, *arguments])
        self._capsys.readouterr()
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
        printed: str = self._capsys.readouterr().out
        return printed


@pytest.fixture
def example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Example:
    return Example(tmp_path, monkeypatch, capsys)


def test_reading_a_data_set(example: Example) -> None:
    assert "records" in example.run("read_dataset.py", str(DATASET))


@pytest.mark.model
def test_the_engine_alone(example: Example) -> None:
    assert example.run("engine.py").count(".png") == 3
    assert len(list(example.folder.glob("engine-pictures/*.png"))) == 3


@pytest.mark.ray
def test_a_pipeline_of_your_own(example: Example, ray_cluster: None) -> None:
    assert example.run("pipeline.py").count("ok") == 2


@pytest.mark.ray
def test_openai_client(example: Example, app_url: str) -> None:
    printed = example.run("openai_client.py", app_url)
    assert (example.folder / "star.png").exists()
    assert "image_generation.completed" in printed


@pytest.mark.ray
def test_dreambooth_from_python(example: Example, ray_cluster: None) -> None:
    """The only quick test in which class images are made by the pool."""
    photos = ROOT / "configs" / "demo" / "subject"
    assert "after 2 steps" in example.run("dreambooth.py", str(photos), "2")
    assert (example.folder / "subject.png").exists()
