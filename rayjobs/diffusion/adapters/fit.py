"""Whether an adapter fits a model, known from the model's configs without loading a weight.

Owns the layers of a model that is not loaded. Raises what the reader raises.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import UNet2DConditionModel

from rayjobs.diffusion.adapters.names import Layers
from rayjobs.diffusion.adapters.reader import read
from rayjobs.diffusion.weights import Weights, lora_file, read_json


def check(path: Path, weights: Weights, config: Path | None = None) -> None:
    """Raise ValueError unless the adapter at `path` can be used with the model.

    `config` is the folder of a single file's configs; without it, a single file's layers are not
    known before it is loaded, and only then is the adapter checked.
    """
    folder = weights.path if weights.path.is_dir() else config
    if folder is not None:
        read(str(path), lora_file(path), layers_of(folder, weights.family))


@lru_cache(maxsize=2)
def layers_of(folder: Path, family: str) -> Layers:
    """The layers of a diffusers folder's UNet and text encoders."""
    index = read_json(folder / "model_index.json")
    encoders = [name for name in ("text_encoder", "text_encoder_2") if (index.get(name) or [0])[0]]
    with torch.device("meta"):
        config = read_json(folder / "unet" / "config.json")
        unet: Any = UNet2DConditionModel.from_config(config)
        parts = {"unet": unet, **{name: _encoder(folder, name, index) for name in encoders}}
    return Layers(family, parts)


def _encoder(folder: Path, name: str, index: dict[str, Any]) -> Any:
    kind = getattr(transformers, index[name][1])
    return kind(kind.config_class.from_pretrained(folder / name))
