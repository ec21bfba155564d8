"""A DreamBooth export as a model: what its URI stands for, locally and on S3."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from rayjobs import storage
from rayjobs.config import BadInput
from rayjobs.dataset.manifest import Manifest
from rayjobs.diffusion.model import load_model
from rayjobs.diffusion.text.inversion import initial_vectors, to_tensors
from rayjobs.generation import job
from rayjobs.generation.config import GenerateConfig
from rayjobs.generation.resolved import resolve
from rayjobs.generation.tools.verify import verify
from rayjobs.generation.worker.shards import ShardWorker
from rayjobs.models import exports
from rayjobs.models.exports import ExportNote
from rayjobs.models.options import ModelConfig

pytestmark = pytest.mark.model

LAYER = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


def values(model: str, output: str) -> dict[str, Any]:
    return {
        "model": {"uri": model},
        "prompts": {"inline": ["a photo of a <sks> star"]},
        "sampler": {"name": "euler", "steps": 3},
        "output": {"uri": output},
    }


def export(folder: Path, **facts: Any) -> Path:
    """An adapter for the starter model, and a word."""
    folder.mkdir()
    model = load_model("starter")
    width = model.unet.get_submodule(LAYER.removeprefix("unet.")).in_features
    torch.manual_seed(0)
    factors = {
        f"{LAYER}.lora_A.weight": torch.randn(4, width),
        f"{LAYER}.lora_B.weight": torch.randn(width, 4),
    }
    save_file(factors, folder / exports.LORA_FILE)
    vectors = initial_vectors(model, "red", 2)
    save_file(to_tensors(model, "<sks>", vectors), folder / exports.EMBEDDINGS_FILE)
    note = {
        "kind": "lora",
        "base_uri": "starter",
        "base_sha256": model.sha256,
        "family": "sdxl",
        "instance_prompt": "a photo of a <sks> star",
        "identifier": "<sks>",
        "step": 1,
        "seed": 0,
        "files": {},
        "photos": {},
    }
    exports.write(str(folder), ExportNote(**{**note, **facts}))
    return folder


def make(uri: str, output: Path) -> dict[str, Any]:
    """The one record of a job with this model."""
    config = resolve(GenerateConfig.model_validate(values(uri, str(output))))
    lock = job.prepare(config)
    list(ShardWorker(config, lock).make([0]))
    manifest = Manifest(str(output))
    (row,) = manifest.format.read(manifest.data, 0)
    assert row["status"] == "ok", row["error"]
    return row


def test_the_same_picture_from_a_folder_and_from_s3(tmp_path: Path, bucket: str) -> None:
    folder = export(tmp_path / "export", tokens=("<sks>",))
    for path in folder.iterdir():
        storage.put_file(f"{bucket}/run/export/{path.name}", path)
    near = make(str(folder), tmp_path / "near")
    far = make(f"{bucket}/run/export", tmp_path / "far")
    plain = make("starter", tmp_path / "plain")
    assert near["image_sha256"] == far["image_sha256"] != plain["image_sha256"]
    assert near["image_id"] == far["image_id"] != plain["image_id"]
    assert near["model_sha256"] == far["model_sha256"] != plain["model_sha256"]
    assert verify(str(tmp_path / "far")).faults == []


def test_what_the_uri_stands_for(tmp_path: Path) -> None:
    folder = str(export(tmp_path / "export"))
    model = exports.resolve(ModelConfig(uri=folder))
    assert model.uri == "starter"
    assert [lora.uri for lora in model.loras] == [f"{folder}/{exports.LORA_FILE}"]
    assert model.words == ()
    assert exports.resolve(model) == model


def test_what_the_run_was_told_of_its_base_goes_with_the_export(tmp_path: Path) -> None:
    told = {"base": "some/whole-model", "prediction_type": "v_prediction"}
    folder = str(export(tmp_path / "export", source=told))
    model = exports.resolve(ModelConfig(uri=folder))
    assert model.details == told
    mine = exports.resolve(ModelConfig(uri=folder, base="starter"))
    assert mine.details == {"base": "starter", "prediction_type": "v_prediction"}


def test_a_base_model_that_is_elsewhere(tmp_path: Path) -> None:
    folder = export(tmp_path / "export", base_uri="/absent/model")
    with pytest.raises(BadInput, match=r"an adapter for the model /absent/model, which is not"):
        exports.resolve(ModelConfig(uri=str(folder)))


def test_a_note_of_another_sort(tmp_path: Path) -> None:
    (tmp_path / exports.FILE).write_text('{"format": 9}')
    with pytest.raises(BadInput, match="its format is 9, not 1"):
        exports.read(str(tmp_path))
    assert exports.read(str(tmp_path / "absent")) is None
