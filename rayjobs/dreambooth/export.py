"""Export: from a checkpoint to weights that other programs load: adapters, diffusers folders.

Owns file names and the manifest beside them. Reads checkpoints through `callback`.
"""

import dataclasses
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import save_file

from rayjobs import storage
from rayjobs.diffusion.files.identity import sha256_of
from rayjobs.diffusion.model import DTYPES, Model
from rayjobs.diffusion.text import inversion
from rayjobs.dreambooth import lock
from rayjobs.dreambooth.checkpoints import Checkpoints
from rayjobs.dreambooth.config import DreamBoothConfig
from rayjobs.dreambooth.resolved import ResolvedRun
from rayjobs.dreambooth.training import callback, layouts
from rayjobs.dreambooth.training.tuned_model import TunedModel
from rayjobs.dreambooth.training.worker import load
from rayjobs.models import exports
from rayjobs.models.exports import (
    EMBEDDINGS_FILE,
    FUSED,
    KOHYA_FILE,
    LORA_FILE,
    PEFT_FOLDER,
    ExportNote,
)


def write(run: ResolvedRun, step: int, metrics: dict[str, float]) -> None:
    """Export the checkpoint of a step to the run's export folder, replacing what is there."""
    uri, folder = run.export_uri, Path(tempfile.mkdtemp(prefix="export-"))
    try:
        tuned = rebuild(run, step)
        save(run.config, tuned, folder)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        facts = describe(run, tuned.model, step, metrics)
        hashes = {path.relative_to(folder).as_posix(): sha256_of(path) for path in files}
        before = exports.read(uri)
        storage.remove(storage.join(uri, exports.FILE))
        for path in files:
            storage.put_file(storage.join(uri, path.relative_to(folder).as_posix()), path)
        exports.write(uri, dataclasses.replace(facts, files=hashes))
        for name in () if before is None else before.files.keys() - hashes.keys():
            storage.remove(storage.join(uri, name))
    finally:
        shutil.rmtree(folder)


def rebuild(
    run: ResolvedRun, step: int, device: str = "cpu", compute: torch.dtype = torch.float32
) -> TunedModel:
    """The model as tuned after a step, or the average of its weights where one is kept.

    For inference only.
    """
    checkpoints = Checkpoints(run.checkpoints_uri)
    (checkpoint,) = [each for each in checkpoints.list() if each.step == step]
    tuned = TunedModel(load(run.config, device, compute), run.config, compute)
    callback.load_weights(checkpoints, checkpoint, tuned)
    return tuned.eval()


def save(config: DreamBoothConfig, tuned: TunedModel, folder: Path) -> None:
    """Write what plain diffusers loads, and the other layouts that the configuration names."""
    if tuned.learned:
        tensors = inversion.to_tensors(tuned.model, config.identifier, list(tuned.learned))
        save_file(tensors, folder / EMBEDDINGS_FILE)
    kind = config.export_kind
    if kind == "lora":
        layouts.save_main(tuned, folder / LORA_FILE)
        if config.output.kohya:
            layouts.save_kohya(tuned, folder / KOHYA_FILE)
        if config.output.peft:
            layouts.save_peft(tuned, folder / PEFT_FOLDER)
    if kind == "full":
        _save_whole(tuned, DTYPES[config.output.dtype], folder)
    elif config.output.fused:
        _save_whole(tuned, DTYPES[config.output.dtype], folder / FUSED)
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors writes files as 0600


def _save_whole(tuned: TunedModel, dtype: torch.dtype, folder: Path) -> None:
    """A diffusers folder that needs neither adapter nor embeddings; changes the tuned model."""
    if tuned.method == "lora":
        for _, network in tuned.parts():
            _fuse(network)
    inversion.settle_words(tuned.model)
    pipeline(tuned.model).to(dtype).save_pretrained(folder)
    for path in folder.glob("*/config.json"):
        values = json.loads(path.read_text())
        if values.pop("_name_or_path", None) is not None:  # a folder of this machine
            path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def pipeline(model: Model) -> Any:
    """The model as diffusers' own pipeline."""
    parts: dict[str, Any] = {
        "vae": model.vae,
        "unet": model.unet,
        "scheduler": model.scheduler,
        "text_encoder": model.text_encoders[0],
        "tokenizer": model.tokenizers[0],
    }
    if model.family == "sdxl":
        return StableDiffusionXLPipeline(
            **parts,
            text_encoder_2=model.text_encoders[1],
            tokenizer_2=model.tokenizers[1],
            force_zeros_for_empty_prompt=model.force_zeros,
            add_watermarker=False,
        )
    plain: Any = StableDiffusionPipeline
    unsafe = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return plain(**parts, **unsafe)


def _fuse(network: Any) -> None:
    """Add the LoRA's product to the weights and remove its layers."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in list(network.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, layer.get_base_layer())
    network._hf_peft_config_loaded = False
    network.__dict__.pop("peft_config", None)


def describe(run: ResolvedRun, model: Model, step: int, metrics: dict[str, float]) -> ExportNote:
    config = run.config
    kind, learns = config.export_kind, config.inversion.num_vectors > 0
    return ExportNote(
        kind=kind,
        tokens=(config.identifier,) if learns else (),
        knows_words=learns and kind == "full",
        base_uri=config.model.uri,
        base_sha256=model.sha256,
        family=model.family,
        instance_prompt=config.instance.prompt,
        identifier=config.identifier,
        step=step,
        steps=config.train.steps,
        dtype=config.output.dtype,
        caption_syntax=config.train.caption_syntax,
        seed=config.train.seed,
        files={},
        photos=lock.photo_names(run, lambda photo: photo.sha256),
        metrics=metrics,
        source=config.model.details,
    )
