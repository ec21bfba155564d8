"""The names of a UNet's layers in the original code, against diffusers' converter."""

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

from rayjobs.diffusion.adapters import ldm

pytestmark = pytest.mark.model

SDXL: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@pytest.mark.parametrize("settings", [SDXL, {}], ids=["sdxl", "sd"])
def test_every_layer_has_its_original_name(settings: dict[str, Any]) -> None:
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel(**settings)
    blocks = ldm.block_names(unet)
    layers = [
        n for n, module in unet.named_modules() if getattr(module, "weight", None) is not None
    ]
    original = {ldm.original_name(name, blocks): name for name in layers}
    assert len(original) == len(layers)
    checkpoint: dict[str, Any] = {}
    for number, name in enumerate(original):
        for kind in ("weight", "bias"):
            checkpoint[f"model.diffusion_model.{name}.{kind}"] = torch.tensor(number)
    config = dict(unet.config) | {"num_class_embeds": None}
    converted = convert_ldm_unet_checkpoint(checkpoint, config)
    numbers = list(original.values())
    assert {key: numbers[int(value)] for key, value in converted.items()} == {
        f"{name}.{kind}": name for name in layers for kind in ("weight", "bias")
    }
