"""A UNet's layers by the names of the original latent-diffusion code (ldm, later sgm).

Checkpoints and most adapters of other tools use these. Owns the correspondence, which follows from
the UNet's structure alone; knows no files.
"""

from collections.abc import Iterator
from typing import Any

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
OUTER = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def original_name(name: str, blocks: dict[str, str]) -> str | None:
    """The original name of the layer `name`; None for one that the original code does not have.

    `blocks` are `block_names` of the UNet.
    """
    if name in OUTER:
        return OUTER[name]
    for block, original in blocks.items():
        if name == block:
            return original
        if name.startswith(f"{block}."):
            inner = name.removeprefix(f"{block}.")
            return f"{original}.{RESNET.get(inner, inner) if '.resnets.' in block else inner}"
    return None


def block_names(unet: Any) -> dict[str, str]:
    """Original names of a UNet's resnets, attentions and resamplers."""
    return dict([*_down(unet), *_middle(unet), *_up(unet)])


def _down(unet: Any) -> Iterator[tuple[str, str]]:
    number = 1  # 0 is conv_in
    for position, block in enumerate(unet.down_blocks):
        name = f"down_blocks.{position}"
        attentions = len(getattr(block, "attentions", []))
        for layer in range(len(block.resnets)):
            yield f"{name}.resnets.{layer}", f"input_blocks.{number}.0"
            if layer < attentions:
                yield f"{name}.attentions.{layer}", f"input_blocks.{number}.1"
            number += 1
        if block.downsamplers is not None:
            yield f"{name}.downsamplers.0.conv", f"input_blocks.{number}.0.op"
            number += 1


def _middle(unet: Any) -> Iterator[tuple[str, str]]:
    middle = unet.mid_block
    if middle is None:
        return
    number = 0
    attentions = getattr(middle, "attentions", [])
    for layer in range(len(middle.resnets)):
        yield f"mid_block.resnets.{layer}", f"middle_block.{number}"
        number += 1
        if layer < len(attentions):
            yield f"mid_block.attentions.{layer}", f"middle_block.{number}"
            number += 1


def _up(unet: Any) -> Iterator[tuple[str, str]]:
    number = 0
    for position, block in enumerate(unet.up_blocks):
        name = f"up_blocks.{position}"
        attentions = len(getattr(block, "attentions", []))
        for layer in range(len(block.resnets)):
            yield f"{name}.resnets.{layer}", f"output_blocks.{number}.0"
            inner = 1
            if layer < attentions:
                yield f"{name}.attentions.{layer}", f"output_blocks.{number}.1"
                inner = 2
            if layer == len(block.resnets) - 1 and block.upsamplers is not None:
                yield f"{name}.upsamplers.0.conv", f"output_blocks.{number}.{inner}.conv"
            number += 1
