"""An adapter file, and what its format says of the weights, as functions of the scale."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from rayjobs.diffusion.model import Model

Changed = Callable[[float], torch.Tensor]

QUERY = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
OUT = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0"
FEED = "up_blocks.0.attentions.0.transformer_blocks.0.ff.net.2"
CONV = "down_blocks.1.resnets.0.conv1"
UP = "up_blocks.0.resnets.1.conv2"
NORM = "down_blocks.1.attentions.0.transformer_blocks.0.norm1"
GROUP = "down_blocks.1.resnets.0.norm1"
TEXT = "encoder.layers.1.self_attn.q_proj"
"""In SDXL's first encoder; transformers has `text_model.` before it in the second."""
SGM = {
    QUERY: "input_blocks_3_1_transformer_blocks_0_attn1_to_q",
    OUT: "input_blocks_3_1_transformer_blocks_0_attn2_to_out_0",
    CONV: "input_blocks_3_0_in_layers_2",
    UP: "output_blocks_1_0_out_layers_3",
    "time_embedding.linear_1": "time_embed_0",
    "add_embedding.linear_2": "label_emb_0_2",
    "conv_in": "input_blocks_0_0",
    "conv_out": "out_2",
    "down_blocks.0.downsamplers.0.conv": "input_blocks_2_0_op",
    "mid_block.resnets.1.time_emb_proj": "middle_block_2_emb_layers_1",
    "up_blocks.0.upsamplers.0.conv": "output_blocks_1_2_conv",
}
"""Layers by their names in the original code, for a UNet of two blocks of one resnet."""


def kohya(name: str) -> str:
    return f"lora_unet_{name.replace('.', '_')}"


@dataclass
class Made:
    """A file, and what it does: weights and biases of (part, layer) at a scale."""

    modules: dict[tuple[str, str], Any]
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    header: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    weights: dict[tuple[str, str], Changed] = field(default_factory=dict)
    biases: dict[tuple[str, str], Changed] = field(default_factory=dict)

    def text_layer(self, part: str) -> str:
        return next(name for of, name in self.modules if of == part and name.endswith(TEXT))

    def weight(self, layer: str, part: str = "unet") -> torch.Tensor:
        return self.modules[part, layer].weight.detach()

    def adds(self, layer: str, delta: torch.Tensor, part: str = "unet") -> None:
        before = self.weights.get((part, layer), lambda _: self.weight(layer, part))
        self.weights[part, layer] = lambda scale: (
            before(scale) + scale * delta.float().reshape(self.weight(layer, part).shape)
        )

    def adds_bias(self, layer: str, delta: torch.Tensor) -> None:
        own = self.modules["unet", layer].bias
        own = torch.zeros(len(delta)) if own is None else own.detach()
        self.biases["unet", layer] = lambda scale: own + scale * delta.float()

    def decomposes(self, layer: str, delta: torch.Tensor, lengths: torch.Tensor, axis: int) -> None:
        """DoRA: rows (axis 0) or columns (axis 1) of W + s D, brought to `lengths`."""
        weight = self.weight(layer)

        def changed(scale: float) -> torch.Tensor:
            whole = weight + scale * delta.view(weight.shape)
            rest = [n for n in range(whole.ndim) if n != axis]
            shape = [-1 if n == axis else 1 for n in range(whole.ndim)]
            return whole / (whole * whole).sum(rest, keepdim=True).sqrt() * lengths.view(shape)

        self.weights["unet", layer] = changed

    def factors(
        self, layer: str, rank: int, part: str = "unet"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        weight = self.weight(layer, part)
        down = random(rank, *weight.shape[1:])
        return down, random(len(weight), rank, *[1] * (weight.ndim - 2))


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape) * 0.3


def product(down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return up.float().flatten(1) @ down.float().flatten(1)


def merged(module: Any, weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor) -> Any:
    """What a layer gives for `x` with another weight and bias."""
    if isinstance(module, torch.nn.Conv2d):
        return F.conv2d(x, weight, bias, module.stride, module.padding)
    if isinstance(module, torch.nn.GroupNorm):
        return F.group_norm(x, module.num_groups, weight, bias, module.eps)
    if isinstance(module, torch.nn.LayerNorm):
        return F.layer_norm(x, module.normalized_shape, weight, bias, module.eps)
    return F.linear(x, weight, bias)


def of(model: Model) -> dict[tuple[str, str], Any]:
    encoders = zip(("text_encoder", "text_encoder_2"), model.text_encoders, strict=False)
    parts = {"unet": model.unet, **dict(encoders)}
    return {(part, name): m for part, root in parts.items() for name, m in root.named_modules()}


def make(model: Model, kind: Callable[[Made], None], seed: int = 0) -> Made:
    torch.manual_seed(seed)
    made = Made(of(model))
    kind(made)
    return made


def write(made: Made, folder: Path, name: str = "adapter.safetensors") -> str:
    if made.config is not None:
        folder = folder / "peft"
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(made.config))
        name = "adapter_model.safetensors"
    save_file(made.tensors, folder / name, made.header or None)
    return str(folder if made.config is not None else folder / name)
