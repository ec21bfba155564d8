"""Jobs of several passes: what records say of them, and which mistakes are told."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayjobs.cli import main
from rayjobs.dataset.lock import read_lock
from rayjobs.dataset.manifest import Manifest
from rayjobs.diffusion.weights import Source, locate
from rayjobs.generation import job
from rayjobs.generation.config import GenerateConfig
from tests.families import save_inpainting, save_refiner

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def configured(model: Path, output: Path, *passes: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": {"uri": str(model)},
        "prompts": {"inline": ["a red star"]},
        "sampler": {"steps": 4, "guidance_scale": 1.0},
        "output": {"uri": str(output)},
        "engine": {"batch_size": 2},
        **({"passes": list(passes)} if passes else {}),
    }


def row_of(values: dict[str, Any]) -> dict[str, Any]:
    config = GenerateConfig.model_validate(values)
    job.run(config)
    assert job.run(config).num_made == 0
    manifest = Manifest(config.output.uri)
    (row,) = manifest.format.read(manifest.data, 0)
    return row


def test_records_have_the_last_pass_s_size(
    folders: dict[str, Path], tmp_path: Path, in_process: None
) -> None:
    larger = {"scale": 1.5, "strength": 0.5}
    ways: list[list[dict[str, Any]]] = [[], [larger], [larger | {"via": "latent"}]]
    rows = [
        row_of(configured(folders["sdxl"], tmp_path / str(number), *passes))
        for number, passes in enumerate(ways)
    ]
    assert [row["status"] for row in rows] == ["ok"] * 3
    assert [(row["width"], row["height"]) for row in rows] == [(64, 64)] + [(96, 96)] * 2
    for key in ("image_id", "image_sha256"):
        assert len({row[key] for row in rows}) == 3


def test_a_refiner_is_in_the_identity(
    folders: dict[str, Path], tmp_path: Path, in_process: None
) -> None:
    """By its weights and where it begins, wherever it lies."""
    refiner = save_refiner(folders["sdxl"], tmp_path / "refiner")
    again = tmp_path / "moved"
    shutil.copytree(refiner, again)
    parts = [(refiner, 0.5), (again, 0.5), (refiner, 0.75)]
    rows = [
        row_of(
            configured(
                folders["sdxl"],
                tmp_path / str(number),
                {"model": str(model), "denoising_start": start},
            )
        )
        for number, (model, start) in enumerate(parts)
    ]
    assert [row["status"] for row in rows] == ["ok"] * 3, rows
    for key in ("image_id", "image_sha256"):
        values = [row[key] for row in rows]
        assert values[0] == values[1] != values[2]
    lock = read_lock(str(tmp_path / "0"))
    assert lock is not None
    assert (
        locate(Source(uri=str(refiner), follows=True)).sha256 in lock.segments[0].passes_sha256[0]
    )
    moved = configured(
        folders["sdxl"], tmp_path / "0", {"model": str(again), "denoising_start": 0.5}
    )
    assert job.run(GenerateConfig.model_validate(moved)).num_made == 0


MISTAKES: list[tuple[str, dict[str, Any]]] = [
    ("passes.0.scale", {"scale": 0.5}),
    ("passes.0.via", {"via": "pixels"}),
    ("passes.0: strength 0.1 of 4 steps leaves no step", {"strength": 0.1}),
    ("passes.0.sampler: unknown sampler 'eule'", {"sampler": "eule"}),
    ("'EulerDiscreteScheduler' has no option 'eta2'", {"sampler_options": {"eta2": 1}}),
    ("sampler 'ipndm' cannot do image-to-image", {"sampler": "ipndm"}),
    ("passes.0.width", {"width": 64}),
    ("denoising_start needs a model", {"denoising_start": 0.5}),
    ("passes.0.denoising_start", {"denoising_start": 1.5, "model": "{refiner}"}),
    (
        "denoising_start and strength are both",
        {"denoising_start": 0.5, "strength": 0.4, "model": "{refiner}"},
    ),
    ("passes.0: denoising_start 0.999 leaves", {"denoising_start": 0.999, "model": "{refiner}"}),
    (
        "passes.0.model: model '/is/not/here' does not exist",
        {"model": "/is/not/here", "strength": 0.5},
    ),
    ("passes.0.model: {fill} only makes masked", {"model": "{fill}", "strength": 0.5}),
    ("passes.0.model: latents of", {"model": "{edm}", "strength": 0.5, "via": "latent"}),
]


def test_mistakes_are_told_before_anything_is_made(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill = save_inpainting(folders["sdxl"], tmp_path / "fill")
    models = {
        "refiner": save_refiner(folders["sdxl"], tmp_path / "refiner"),
        "fill": fill,
        "edm": folders["playground"],
    }
    cases = []
    for told, it in MISTAKES:
        each = {k: v.format(**models) if k == "model" else v for k, v in it.items()}
        wanted = told.format(**models)
        cases.append((wanted, configured(folders["sdxl"], tmp_path / "out", each)))
    refiner = configured(models["refiner"], tmp_path / "out")
    cases.append(("name it as the model of one of passes", refiner))
    cases.append(("jobs have no masks", configured(fill, tmp_path / "out")))
    for told, values in cases:
        (tmp_path / "job.yaml").write_text(yaml.safe_dump(values))
        assert main(["generate", str(tmp_path / "job.yaml")]) == 2
        said = capsys.readouterr().err
        assert told in said, (told, said)
        assert not (tmp_path / "out").exists()
