"""From a model's files to diffusers' pipeline, with just the parts that the engine uses.

Owns which part comes from which file. Never runs any code of a model's own. Knows nothing of
devices, or of how a model is held.
"""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel

from rayjobs.diffusion.files.folder import read_json
from rayjobs.diffusion.files.single import FIRST_ENCODER, LDM, SD_ENCODER, Single
from rayjobs.diffusion.sampler_names import Prediction
from rayjobs.diffusion.weights import Weights


def load_pipeline(weights: Weights, dtype: torch.dtype) -> Any:
    """The pipeline of a folder or of a single file, its floating point numbers in `dtype`."""
    sdxl = weights.family == "sdxl"
    parts: dict[str, Any] = {"add_watermarker": False} if sdxl else {"safety_checker": None}
    if weights.single is not None:
        pipeline = _of_single(weights, weights.single, dtype, parts)
    else:
        if not sdxl:
            parts["requires_safety_checker"] = False
        pipeline = _of_folder(weights, dtype, parts)
    if weights.prediction_type is not None and weights.single is None:
        pipeline.scheduler = _scheduler(weights.scheduler)
    _check_all_loaded(pipeline)
    return pipeline


def scheduler_config(scheduler: Any) -> dict[str, Any]:
    """A diffusers scheduler's configuration, with its class's name among the keys."""
    return {**scheduler.config, "_class_name": type(scheduler).__name__}


def prediction_of(scheduler: Any) -> Prediction:
    """What a model predicts that has this diffusers scheduler as its own."""
    return Prediction.of(scheduler_config(scheduler))


def _of_folder(weights: Weights, dtype: torch.dtype, parts: dict[str, Any]) -> Any:
    variants = set(weights.variants.values())
    if len(variants) > 1:  # diffusers would take a variant wherever there is one
        for name in weights.variants:
            parts[name] = load_part(weights, name, dtype)
        variants = {None}
    return getattr(diffusers, weights.class_name).from_pretrained(
        weights.path, dtype=dtype, use_safetensors=True, variant=variants.pop(), **parts
    )


def load_part(weights: Weights, name: str, dtype: torch.dtype) -> Any:
    """One part of a folder that has weights, in the variant in which it exists."""
    library, class_name = read_json(weights.path / "model_index.json")[name]
    kind = getattr(importlib.import_module(library), class_name)
    return kind.from_pretrained(
        weights.path / name,
        torch_dtype=dtype,
        use_safetensors=True,
        variant=weights.variants[name],
    )


def _of_single(weights: Weights, single: Single, dtype: torch.dtype, parts: dict[str, Any]) -> Any:
    folder = weights.load_config_folder()
    parts["scheduler"] = _scheduler(weights.scheduler)
    for name in single.missing:
        assert weights.base is not None
        parts[name] = load_part(weights.base, name, dtype)
    if "text_encoder" in single.parts and "text_encoder_2" in single.missing:
        # diffusers looks for the first encoder only where it finds the second one.
        assert weights.base is not None
        parts["text_encoder"] = load_part(weights.base, "text_encoder", dtype)
        _fill_encoder(parts["text_encoder"], single, f"{FIRST_ENCODER}transformer.text_model.")
    elif single.has_bare_encoder:
        config = CLIPTextConfig.from_pretrained(folder / "text_encoder")
        parts["text_encoder"] = CLIPTextModel(config).to(dtype=dtype)
        _fill_encoder(parts["text_encoder"], single, SD_ENCODER)
    config = weights.unet_config(folder)
    # diffusers takes the folder's number of channels: that of the model it was made from.
    if single.prefix != LDM or config != read_json(folder / "unet" / "config.json"):
        parts["unet"] = _load_unet(single, config, folder, dtype)
    pipeline = getattr(diffusers, weights.class_name).from_single_file(
        str(single.header.path), config=str(folder), dtype=dtype, **parts
    )
    if single.latents:
        pipeline.vae.register_to_config(**single.latents)
    return pipeline


def _load_unet(single: Single, config: Mapping[str, Any], folder: Path, dtype: torch.dtype) -> Any:
    """A UNet whose tensors have the names of diffusers, or the original ones without a prefix."""
    state: Any = load_file(single.header.path)
    if single.prefix is not None:
        state = {
            LDM + name.removeprefix(single.prefix): tensor
            for name, tensor in state.items()
            if name.startswith(single.prefix)
        }
        kind: Any = UNet2DConditionModel
        return kind.from_single_file(
            state,
            config=str(folder),
            subfolder="unet",
            torch_dtype=dtype,
            in_channels=single.channels,
        )
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(dict(config))
    unet.load_state_dict({name: it.to(dtype) for name, it in state.items()}, assign=True)
    return unet


def _fill_encoder(encoder: Any, single: Single, begin: str) -> None:
    """Put a file's own weights into a CLIP text model. Raises RuntimeError when some are absent."""
    with safe_open(single.header.path, "pt") as file:
        mine = {n.removeprefix(begin): n for n in file.keys() if n.startswith(begin)}  # noqa: SIM118
        names = {name: mine.get(name.removeprefix("text_model.")) for name in encoder.state_dict()}
        encoder.load_state_dict({n: file.get_tensor(own) for n, own in names.items() if own})


def _scheduler(config: Mapping[str, Any]) -> Any:
    kind = getattr(diffusers, str(config["_class_name"]))
    return kind.from_config({key: value for key, value in config.items() if key[0] != "_"})


def _check_all_loaded(pipeline: Any) -> None:
    """Raise ValueError for weights that no file gave: they would be left as they happen to be."""
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            lost = [key for key, tensor in part.named_parameters() if tensor.is_meta]
            if lost:
                raise ValueError(f"its files have no {name}.{lost[0]} (of {len(lost)} tensors)")
