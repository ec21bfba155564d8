"""A job's adapters in the weights of its model, and scores beside its steps."""

import io
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rayjobs.diffusion.model import Model
from rayjobs.generation.config import GenerateConfig
from rayjobs.generation.spec.lock import job_part
from rayjobs.generation.spec.records import Record
from rayjobs.generation.worker.generator import RecordGenerator
from rayjobs.models import warming
from tests.diffusion.adapters import formats_kohya
from tests.diffusion.adapters.made import make, write

SETTINGS = {"sampler": "euler", "guidance_scale": 3.0, "guidance_rescale": 0.0, "strength": 0.5}


def record(number: int) -> Record:
    unset: dict[str, Any] = dict.fromkeys(
        ["negative_prompt", "clip_skip", "width", "height", "init_image", "init_uri"]
    )
    return Record(number=number, prompt="a star", seed=number, steps=3, **SETTINGS, **unset)


def test_adapters_in_the_weights(
    tiny: Model, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are there when the model is compiled."""
    warmed: list[Any] = []
    monkeypatch.setattr(
        warming, "warm", lambda engine, *told: warmed.append((bool(engine.loras._own), *told))
    )
    path = write(make(tiny, formats_kohya.kohya_conv), tmp_path)
    pictures, ids, parts = [], [], []
    for loras, fuse in (([], False), ([path], False), ([path], True)):
        config = GenerateConfig.model_validate(
            {
                "model": {"uri": str(folders["sdxl"]), "loras": [{"uri": p} for p in loras]},
                "prompts": {"inline": ["a star"]},
                "engine": {"batch_size": 2, "fuse_loras": fuse},
                "output": {"uri": str(tmp_path / "out")},
            }
        )
        generator = RecordGenerator(config, "tiny", guided=True)
        assert warmed.pop() == (generator.is_fused, None, [(None, None)])
        rows = [row for _, row in generator.generate([record(0), record(1)])]
        assert [row["status"] for row in rows] == ["ok", "ok"], rows
        pictures.append(
            [np.asarray(Image.open(io.BytesIO(r["image"]["bytes"])), int) for r in rows]
        )
        ids.append({row["image_id"] for row in rows})
        parts.append(job_part(config))
    none, beside, fused = (np.stack(each) for each in pictures)
    assert np.abs(none - beside).mean() > 1
    assert np.abs(fused - beside).max() <= 1
    assert len(set.union(*ids)) == 6
    assert ["fuse_loras" in part["engine"] for part in parts] == [False, False, True]


class Scorer:
    """A score that tells the record's number, which its prompt ends with."""

    def __init__(self) -> None:
        self.threads: set[str] = set()

    def score(self, image: Image.Image, prompt: str) -> dict[str, float]:
        self.threads.add(threading.current_thread().name)
        if prompt == "a star 9":
            raise RuntimeError("CUDA error: the device is lost")
        return {"clip_score": float(prompt.split()[-1])}


def test_scores_beside_the_steps(folders: dict[str, Path], tmp_path: Path) -> None:
    """Each record has its own, in the order in which pictures are finished; an error ends all."""
    config = GenerateConfig.model_validate(
        {
            "model": {"uri": str(folders["sdxl"])},
            "prompts": {"inline": ["a star"]},
            "engine": {"batch_size": 2},
            "output": {"uri": str(tmp_path / "out")},
        }
    )
    generator = RecordGenerator(config, "tiny", guided=True)
    records = [replace(record(n), prompt=f"a star {n}", steps=1 + n % 2) for n in range(4)]
    expected = [made.number for made, _ in generator.generate(records)]
    generator.scorer = scorer = Scorer()
    generator._scoring = ThreadPoolExecutor(1, thread_name_prefix="scoring")
    rows = list(generator.generate(records))
    assert [made.number for made, _ in rows] == expected
    assert all(row["clip_score"] == made.number for made, row in rows)
    assert scorer.threads == {"scoring_0"}
    with pytest.raises(RuntimeError, match="the device is lost"):
        list(generator.generate([replace(record(9), prompt="a star 9")]))
