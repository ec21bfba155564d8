"""A data set of control samples: outlines in, pictures that obey them out, both of them stored.

Marked slow: 256 pictures, made three times over.
"""

import base64
import csv
import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import yaml
from PIL import Image

from rayjobs import storage
from rayjobs.dataset.manifest import Manifest
from rayjobs.starter import checker, world
from tests.nodes import wait_for
from tests.serving.calls import ask_all
from tests.serving.running import running

pytestmark = [pytest.mark.model, pytest.mark.ray, pytest.mark.slow]

IMAGES = 256
STEPS = 12
GUIDANCE = 4.0


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Outlines of figures, and prompts that say colours, but no shape."""
    place = tmp_path_factory.mktemp("samples")
    with (place / "prompts.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["prompt", "outline", "seed"])
        for number in range(IMAGES):
            rng = np.random.default_rng([31, number])
            colour, ground = (str(each) for each in rng.choice(list(world.COLOURS), 2, False))
            shape, at = str(rng.choice(world.SHAPES)), str(rng.choice(list(world.PLACES)))
            scene = world.Scene(colour, shape, ground, place=at)
            _, cover = world.draw_covered(scene, rng)
            Image.fromarray(world.edges(cover)).save(place / f"{number}.png")
            np.save(place / f"{number}.npy", cover > 0.5)
            words = f"a photo of a {colour} figure on a {ground} background"
            rows.writerow([words, f"{number}.png", number])
    return place


def start(place: Path, output: Path) -> "subprocess.Popen[bytes]":
    config = {
        "model": {"uri": "starter"},
        "prompts": {"uri": str(place / "prompts.csv")},
        "sampler": {"steps": STEPS, "guidance_scale": GUIDANCE},
        "controls": [{"uri": "starter", "column": "outline"}],
        "output": {"uri": str(output), "images_per_shard": 16, "control_images": True},
        "workers": {"min": 2},
    }
    file = output.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config))
    return subprocess.Popen([sys.executable, "-m", "rayjobs", "generate", str(file)])


def hashes(output: Path) -> list[str]:
    return [entry["sha256"] for entry in Manifest(str(output)).entries()]


def served(rows: list[dict[str, Any]]) -> list[np.ndarray]:
    """What the API gives for the same prompts, seeds and outlines."""
    bodies = []
    for row in rows:
        outline = base64.b64encode(row["conditioning_image"]["bytes"]).decode()
        settings = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "size": "64x64"}
        control = {"name": "outlines", "image": outline}
        bodies.append(
            {"prompt": row["prompt"], "seed": row["seed"], "controls": [control], **settings}
        )
    keys = {
        "models": [{"name": "starter", "uri": "starter"}],
        "controls": [{"name": "outlines", "uri": "starter"}],
    }
    with running(keys) as app:
        return [answer.pictures()[0] for answer in ask_all(app.url, bodies)]


def test_control_samples(place: Path, tmp_path: Path) -> None:
    """Killed with its whole group in the middle and run again: the same hashes; the pictures obey;
    readers get both of a sample; the API gives the same picture, within one level."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    with start(place, whole) as calm:
        assert calm.wait() == 0
    with start(place, parts) as killed:
        manifest = str(parts / "manifest")
        wait_for(lambda: parts.exists() and len(storage.list_files(manifest)) >= 4, 300)
        os.kill(killed.pid, signal.SIGKILL)
    assert len(hashes(parts)) < IMAGES // 16
    with start(place, parts) as again:
        assert again.wait() == 0
    assert hashes(parts) == hashes(whole)

    loaded = datasets.load_dataset(str(whole), cache_dir=str(tmp_path / "cache"))["train"]
    assert len(loaded) == IMAGES
    obeyed = []
    for number, sample in enumerate(loaded):
        outline = Image.open(place / f"{number}.png")
        assert sample["conditioning_image"].tobytes() == outline.tobytes()
        picture = np.asarray(sample["image"].convert("RGB"))
        obeyed.append(checker.follows(picture, np.load(place / f"{number}.npy")))
    assert np.mean(obeyed) >= 0.95

    data = Manifest(str(whole))
    rows = list(data.format.read(data.data, 3))
    for row, picture in zip(rows, served(rows), strict=True):
        stored = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB"), int)
        assert np.abs(stored - picture).max() <= 1
