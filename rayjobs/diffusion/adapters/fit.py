"""Whether adapters fit a model, known from the model's configs without loading a weight.

Owns the layers of a model that is not loaded. Raises what the reader raises.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import UNet2DConditionModel

from rayjobs.diffusion.adapters.names import Layers
from rayjobs.diffusion.adapters.reader import read
from rayjobs.diffusion.files.beside import lora_file
from rayjobs.diffusion.files.folder import read_json
from rayjobs.diffusion.weights import Weights


def check(paths: Sequence[Path], weights: Weights) -> None:
    """Raise ValueError unless the adapters at `paths` fit the model.

    A single file's layers are known where its configurations are at hand; else adapters are checked
    when the model is loaded.
    """
    folder = weights.path if weights.single is None else weights.config_folder
    if folder is not None and paths:
        layers = layers_of(folder, weights)
        for path in paths:
            read(str(path), lora_file(path), layers)


def layers_of(folder: Path, weights: Weights) -> Layers:
    """The layers of a model whose configurations are in `folder`."""
    index = read_json(folder / "model_index.json")
    encoders = [name for name in ("text_encoder", "text_encoder_2") if (index.get(name) or [0])[0]]
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(weights.unet_config(folder))
        parts = {"unet": unet, **{name: _encoder(folder, name, index) for name in encoders}}
    return Layers(weights.family, parts)


def _encoder(folder: Path, name: str, index: dict[str, Any]) -> Any:
    kind = getattr(transformers, index[name][1])
    return kind(kind.config_class.from_pretrained(folder / name))
