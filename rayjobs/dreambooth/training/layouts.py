"""A trained adapter in the layouts of other programs: diffusers', kohya's and peft's.

Owns key names and metadata. Knows nothing of checkpoints.
"""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers
from safetensors.torch import save_file

from rayjobs.dreambooth.training import lora
from rayjobs.dreambooth.training.tuned_model import TunedModel

KOHYA_FIELDS = {
    "lora_A.weight": "lora_down.weight",
    "lora_B.weight": "lora_up.weight",
    "lora_magnitude_vector": "dora_scale",
}
"""peft's names of tensors in kohya's words; those of LoHa and LoKr are the same."""


def save_main(tuned: TunedModel, path: Path) -> None:
    """diffusers' file, or kohya's for the kinds that diffusers does not read."""
    if any(config.peft_type == "LORA" for config in _configs(tuned)):
        _save_diffusers(tuned, path)
    else:
        save_kohya(tuned, path)


def save_kohya(tuned: TunedModel, path: Path) -> None:
    """kohya's and LyCORIS' layout, which ComfyUI, A1111 and their kin read."""
    tensors: dict[str, torch.Tensor] = {}
    for part, network in tuned.parts():
        prefix = _kohya_prefix(part, tuned.model.family)
        layers = lora.strengths(network)
        given = lora.state(network)
        for name, (rank, alpha) in layers.items():
            start = f"{name}."
            own = {k.removeprefix(start): v for k, v in given.items() if k.startswith(start)}
            layer = f"{prefix}_{_with_text_model(part, name).replace('.', '_')}"
            tensors |= {f"{layer}.{k}": v for k, v in _kohya_layer(own, rank, alpha).items()}
    save_file(tensors, path)


def save_peft(tuned: TunedModel, folder: Path) -> None:
    """A folder for each network, which `peft.PeftModel.from_pretrained` takes."""
    for part, network in tuned.parts():
        (folder / part).mkdir(parents=True)
        tensors = {f"base_model.model.{k}": _plain(v) for k, v in lora.state(network).items()}
        save_file(tensors, folder / part / "adapter_model.safetensors", {"format": "pt"})
        settings = _settings(network.peft_config[lora.NAME])
        text = json.dumps(settings | {"inference_mode": True}, indent=2, sort_keys=True)
        (folder / part / "adapter_config.json").write_text(text)


def _save_diffusers(tuned: TunedModel, path: Path) -> None:
    kind: Any = (
        StableDiffusionXLPipeline if tuned.model.family == "sdxl" else StableDiffusionPipeline
    )
    layers, networks = {}, {}
    for part, network in tuned.parts():
        tensors = lora.state(network)
        if not _needs_peft_names(network):
            tensors = convert_state_dict_to_diffusers(tensors)
        layers[f"{part}_lora_layers"] = {
            _with_text_model(part, name): _plain(tensor) for name, tensor in tensors.items()
        }
        networks[part] = network
    # Without its metadata diffusers assumes that alpha is the rank.
    metadata = _collate_lora_metadata(networks)
    metadata = {name: _tidy(settings) for name, settings in metadata.items()}
    kind.save_lora_weights(path.parent, weight_name=path.name, **layers, **metadata)
    _sort_metadata(path)


def _needs_peft_names(network: Any) -> bool:
    """Of a file with convolutions diffusers' own names lose the others: it reads one spelling."""
    layers = lora.strengths(network)
    convolutions = any(name.endswith(lora.CONVOLUTION) for name in layers)
    return convolutions or network.peft_config[lora.NAME].use_dora


def _kohya_layer(own: dict[str, torch.Tensor], rank: int, alpha: float) -> dict[str, torch.Tensor]:
    tensors = {KOHYA_FIELDS.get(name, name): _plain(tensor) for name, tensor in own.items()}
    if "dora_scale" in tensors:
        shape = [-1, *[1] * (tensors["lora_down.weight"].ndim - 1)]
        tensors["dora_scale"] = tensors["dora_scale"].reshape(shape)
    if {"lokr_w1", "lokr_w2"} <= tensors.keys():  # LyCORIS takes no alpha where both are whole
        tensors["lokr_w1"] = tensors["lokr_w1"] * (alpha / rank)
        alpha = float(rank)
    return tensors | {"alpha": torch.tensor(float(alpha))}


def _kohya_prefix(part: str, family: str) -> str:
    if part == "unet":
        return "lora_unet"
    if family != "sdxl":
        return "lora_te"
    return "lora_te1" if part == "text_encoder" else "lora_te2"


def _configs(tuned: TunedModel) -> list[Any]:
    return [network.peft_config[lora.NAME] for _, network in tuned.parts()]


def _settings(config: Any) -> dict[str, Any]:
    return _tidy(config.to_dict())


def _tidy(settings: dict[str, Any]) -> dict[str, Any]:
    """Without where the model lay on this machine, and sets in one order in every process."""
    kept = {key: value for key, value in settings.items() if key != "base_model_name_or_path"}
    return {k: sorted(v) if isinstance(v, (set, list)) else v for k, v in kept.items()}


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().float().cpu().contiguous()


def _with_text_model(part: str, name: str) -> str:
    """transformers 5.6 dropped `text_model.` from names; other programs expect it."""
    if part.startswith("text") and not name.startswith("text_model."):
        return f"text_model.{name}"
    return name


def _sort_metadata(path: Path) -> None:
    """Give a safetensors file the same bytes each time: its metadata is written in any order."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors are aligned to 8 bytes
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[start:])
