"""Export: from a checkpoint to weights that other programs load: LoRA files, diffusers folders.

Owns file names, key names and the manifest beside them. Reads checkpoints through `callback`.
"""

import dataclasses
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from safetensors.torch import load_file, save_file

from rayjobs import storage
from rayjobs.diffusion.model import DTYPES, Model
from rayjobs.diffusion.text import inversion
from rayjobs.diffusion.weights import sha256_of
from rayjobs.dreambooth import lock
from rayjobs.dreambooth.config import DreamBoothConfig
from rayjobs.dreambooth.resolved import ResolvedRun
from rayjobs.dreambooth.training import callback, lora
from rayjobs.dreambooth.training.checkpoints import Checkpoints
from rayjobs.dreambooth.training.tuned_model import TunedModel
from rayjobs.dreambooth.training.worker import load
from rayjobs.models import exports
from rayjobs.models.exports import EMBEDDINGS_FILE, FUSED, KOHYA_FILE, LORA_FILE, ExportNote

FACTOR = re.compile(r"\.lora(_linear_layer)?\.(?P<half>down|up)\.weight$")


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
        _save_lora(tuned, folder)
        if config.output.kohya:
            layers = load_file(folder / LORA_FILE)
            alpha = config.lora.alpha or config.lora.rank
            save_file(_to_kohya(layers, alpha), folder / KOHYA_FILE)
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


def _save_lora(tuned: TunedModel, folder: Path) -> None:
    kind: Any = (
        StableDiffusionXLPipeline if tuned.model.family == "sdxl" else StableDiffusionPipeline
    )
    layers, networks = {}, {}
    for part, network in tuned.parts():
        tensors = convert_state_dict_to_diffusers(lora.state(network))
        layers[f"{part}_lora_layers"] = {
            _with_text_model(part, name): tensor.float().cpu().contiguous()
            for name, tensor in tensors.items()
        }
        networks[part] = network
    # Without its metadata diffusers assumes that alpha is the rank.
    metadata = _collate_lora_metadata(networks)
    for adapter in metadata.values():
        adapter.pop("base_model_name_or_path", None)  # where the model lay, on this machine
        for key, value in adapter.items():  # of sets, in another order in every process
            adapter[key] = sorted(value) if isinstance(value, (set, list)) else value
    kind.save_lora_weights(folder, **layers, **metadata)
    _sort_metadata(folder / LORA_FILE)


def _sort_metadata(path: Path) -> None:
    """Give a safetensors file the same bytes each time: its metadata is written in any order."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors are aligned to 8 bytes
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[start:])


def _with_text_model(part: str, name: str) -> str:
    """transformers 5.6 dropped `text_model.` from names; other programs expect it."""
    if part.startswith("text") and not name.startswith("text_model."):
        return f"text_model.{name}"
    return name


def _to_kohya(layers: dict[str, torch.Tensor], alpha: float) -> dict[str, torch.Tensor]:
    # diffusers' converter reads peft's names; it converts its own files' names only in part.
    by_peft = {FACTOR.sub(_peft_factor, name): tensor for name, tensor in layers.items()}
    tensors: dict[str, torch.Tensor] = convert_state_dict_to_kohya(by_peft)
    for name in [name for name in tensors if name.endswith("lora_down.weight")]:
        tensors[name.replace("lora_down.weight", "alpha")] = torch.tensor(float(alpha))
    return tensors


def _peft_factor(match: re.Match[str]) -> str:
    return ".lora_A.weight" if match["half"] == "down" else ".lora_B.weight"


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
        seed=config.train.seed,
        files={},
        photos=lock.photo_names(run, lambda photo: photo.sha256),
        metrics=metrics,
    )
