"""T2I-Adapters: controls that give the same at every step, so that a picture is read once.

Owns what of them fits a UNet. Knows nothing of rows. Legend: C H W channels and size.
"""

import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from rayjobs.diffusion.modules.upload import upload

SIDE = 1024
"""Of a picture, in pixels, on which an adapter and a UNet are compared."""
Shape = tuple[int, int]
"""Channels, and the side of a square."""


class T2IAdapter:
    """A loaded adapter."""

    def __init__(self, path: str, stamp: tuple[int, ...], sha256: str, net: Any):
        self.path = path
        self.stamp = stamp
        self.sha256 = sha256
        self.net = net
        self.colours: int = net.config.in_channels

    @cached_property
    def num_bytes(self) -> int:
        return sum(each.nbytes for each in self.net.parameters())

    def check_size(self, width: int, height: int) -> None:
        """Raise ValueError for a size that it does not divide into whole parts."""
        factor, name = self.net.downscale_factor, Path(self.path).name
        if width % factor or height % factor:
            near = [max(1, round(side / factor)) * factor for side in (width, height)]
            raise ValueError(
                f"the size is {width} x {height}, but the T2I-Adapter {name} takes multiples of "
                f"{factor}, such as {near[0]} x {near[1]}"
            )

    def read(self, pixels_1CHW: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What it adds within the UNet's blocks for a picture (1, 3, H, W) in 0..1."""
        weight = next(self.net.parameters())
        pixels_1CHW = pixels_1CHW[:, : self.colours].to(weight.dtype)
        return tuple(self.net(upload(pixels_1CHW, weight.device)))


def check_fit(name: str, net: Any, unet: Mapping[str, Any], vae_scale: int) -> None:
    """Raise ValueError unless an adapter, without weights, is made for such UNets."""
    if net.config.in_channels not in (1, 3):
        raise ValueError(
            f"T2I-Adapter {name} takes pictures of {net.config.in_channels} channels, not 1 or 3"
        )
    given = _given(net)
    taken = _taken(unet, SIDE // vae_scale)
    if given != taken[: len(given)]:
        raise ValueError(
            f"T2I-Adapter {name} is not for this model: at {SIDE} pixels it gives {_said(given)}, "
            f"the model's blocks take {_said(taken)}; give one that was trained for its family"
        )


def _given(net: Any) -> list[Shape]:
    with torch.device("meta"):
        features = net(torch.empty(1, net.config.in_channels, SIDE, SIDE))
    return [(each.shape[1], each.shape[-1]) for each in features]


def _taken(unet: Mapping[str, Any], side: int) -> list[Shape]:
    """What each down block of a UNet takes: before it halves the picture where it attends to texts,
    else after; and the middle."""
    widths, kinds = unet["block_out_channels"], unet["down_block_types"]
    shapes = []
    for number, (width, kind) in enumerate(zip(widths, kinds, strict=True)):
        halved = side if number == len(widths) - 1 else math.ceil(side / 2)
        shapes.append((width, side if "CrossAttn" in kind else halved))
        side = halved
    return [*shapes, (widths[-1], side)]


def _said(shapes: list[Shape]) -> str:
    return ", ".join(f"{width} x {side} x {side}" for width, side in shapes)
