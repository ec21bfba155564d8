"""Every program under examples/ runs, as a newcomer would run it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DATASET = ROOT / "tests" / "fixtures" / "before_rooms" / "tuned"


def run(name: str, folder: Path, *arguments: str) -> str:
    """What an example prints, run in `folder`."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_reading_a_data_set(tmp_path: Path) -> None:
    assert "records" in run("read_dataset.py", tmp_path, str(DATASET))


def test_the_engine_alone(tmp_path: Path) -> None:
    assert run("engine.py", tmp_path).count(".png") == 3
    assert len(list(tmp_path.glob("engine-pictures/*.png"))) == 3


@pytest.mark.ray
def test_a_pipeline_of_your_own(tmp_path: Path) -> None:
    assert run("pipeline.py", tmp_path).count("ok") == 2


@pytest.mark.ray
def test_openai_client(tmp_path: Path, app_url: str) -> None:
    printed = run("openai_client.py", tmp_path, app_url)
    assert (tmp_path / "star.png").exists()
    assert "image_generation.completed" in printed


@pytest.mark.ray
def test_dreambooth_from_python(tmp_path: Path) -> None:
    photos = ROOT / "configs" / "demo" / "subject"
    assert "after 2 steps" in run("dreambooth.py", tmp_path, str(photos), "2")
    assert (tmp_path / "subject.png").exists()
