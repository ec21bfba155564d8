"""Jobs of several passes: what records say of them, and which mistakes are told."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from rayjobs.cli import main
from rayjobs.dataset.manifest import Manifest
from rayjobs.generation import job
from rayjobs.generation.config import GenerateConfig
from tests.families import save_inpainting

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


MISTAKES: list[tuple[str, dict[str, Any]]] = [
    ("passes.0.scale", {"scale": 0.5}),
    ("passes.0.via", {"via": "pixels"}),
    ("passes.0: strength 0.1 of 4 steps leaves no step", {"strength": 0.1}),
    ("passes.0.sampler: unknown sampler 'eule'", {"sampler": "eule"}),
    ("'EulerDiscreteScheduler' has no option 'eta2'", {"sampler_options": {"eta2": 1}}),
    ("sampler 'ipndm' cannot do image-to-image", {"sampler": "ipndm"}),
    ("passes.0.width", {"width": 64}),
]


def test_mistakes_are_told_before_anything_is_made(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill = save_inpainting(folders["sdxl"], tmp_path / "fill")
    cases = [(told, configured(folders["sdxl"], tmp_path / "out", it)) for told, it in MISTAKES]
    cases.append(("jobs have no masks", configured(fill, tmp_path / "out")))
    for told, values in cases:
        (tmp_path / "job.yaml").write_text(yaml.safe_dump(values))
        assert main(["generate", str(tmp_path / "job.yaml")]) == 2
        said = capsys.readouterr().err
        assert told in said, (told, said)
        assert not (tmp_path / "out").exists()
