"""Small random ControlNets. Loads torch: import it inside fixtures."""

from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, T2IAdapter, UNet2DConditionModel
from safetensors.torch import save_file

SPREAD = 0.3
"""Of the layers that training begins with zeros in, so that each control moves the picture."""


def save_controlnets(
    model: Path, folder: Path, count: int = 2, channels: tuple[int, ...] = (8, 8, 16, 16)
) -> list[str]:
    """ControlNets for the model in a folder, as diffusers saves them; their folders.

    Pictures are halved between `channels`: as often as the model's autoencoder halves them.
    Those of odd numbers read pictures with red and blue exchanged.
    """
    unet = UNet2DConditionModel.from_pretrained(model / "unet")
    paths = []
    for number in range(count):
        torch.manual_seed(100 + number)
        net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=channels)
        ends = [net.controlnet_cond_embedding.conv_out, *net.controlnet_down_blocks]
        for layer in [*ends, net.controlnet_mid_block]:
            torch.nn.init.normal_(layer.weight, std=SPREAD)
        order = "bgr" if number % 2 else "rgb"
        net.register_to_config(controlnet_conditioning_channel_order=order)
        net.save_pretrained(folder / f"net-{number}")
        paths.append(str(folder / f"net-{number}"))
    return paths


def save_t2i_adapters(folder: Path) -> list[str]:
    """T2I-Adapters for small models in a folder: two alike, and one that reads grey pictures."""
    paths = []
    sizes = {"num_res_blocks": 1, "downscale_factor": 16}
    large: dict[str, Any] = {"channels": [16, 32], "adapter_type": "full_adapter_xl"}
    for number, more in enumerate((large, large, {"channels": [16], "in_channels": 1})):
        torch.manual_seed(400 + number)
        net = T2IAdapter(**sizes, **more)
        torch.nn.init.normal_(net.adapter.conv_in.weight, std=SPREAD)
        net.save_pretrained(folder / f"t2i-{number}")
        paths.append(str(folder / f"t2i-{number}"))
    return paths


def save_lora(model: Path, file: Path) -> str:
    """A random adapter of rank 2 for the attention of that model's UNet."""
    unet = UNet2DConditionModel.from_pretrained(model / "unet")
    torch.manual_seed(7)
    tensors = {}
    for name, layer in unet.named_modules():
        if name.endswith((".to_q", ".to_v")):
            tensors[f"unet.{name}.lora_A.weight"] = torch.randn(2, layer.in_features) * 0.2
            tensors[f"unet.{name}.lora_B.weight"] = torch.randn(layer.out_features, 2) * 0.2
    save_file(tensors, file)
    return str(file)
