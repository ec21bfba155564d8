"""Control pictures made as large as the images that follow them, as diffusers' pipelines do.

Owns that one change of pixels. Knows nothing of ControlNets.
"""

from functools import lru_cache
from typing import cast

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image


def fitted(picture: Image.Image, size: tuple[int, int], vae_scale: int) -> Image.Image:
    """The picture (RGB) stretched to this width and height."""
    width, height = size
    return cast(Image.Image, _processor(vae_scale).resize(picture, height, width))


def as_pixels(picture: Image.Image, size: tuple[int, int], vae_scale: int) -> torch.Tensor:
    """The same as (1, 3, H, W) in 0..1."""
    width, height = size
    pixels_1CHW: torch.Tensor = _processor(vae_scale).preprocess(picture, height, width)
    return pixels_1CHW


@lru_cache
def _processor(vae_scale: int) -> VaeImageProcessor:
    return VaeImageProcessor(vae_scale_factor=vae_scale, do_convert_rgb=True, do_normalize=False)
