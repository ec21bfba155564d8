"""Control pictures as ControlNets are given them: as large as the image, drawn anew where asked.

Owns that change of pixels, which is that of diffusers' pipelines. Knows nothing of ControlNets.
"""

from functools import lru_cache
from typing import cast

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from rayjobs.images import edges


def fitted(
    picture: Image.Image, size: tuple[int, int], vae_scale: int, preprocess: str | None = None
) -> Image.Image:
    """The picture (RGB) stretched to this width and height; then, of `canny`, its edges."""
    width, height = size
    picture = cast(Image.Image, _processor(vae_scale).resize(picture, height, width))
    return edges.canny(picture) if preprocess == "canny" else picture


def as_pixels(picture: Image.Image, size: tuple[int, int], vae_scale: int) -> torch.Tensor:
    """A picture, fitted if it is not yet, as (1, 3, H, W) in 0..1."""
    width, height = size
    pixels_1CHW: torch.Tensor = _processor(vae_scale).preprocess(picture, height, width)
    return pixels_1CHW


@lru_cache
def _processor(vae_scale: int) -> VaeImageProcessor:
    return VaeImageProcessor(vae_scale_factor=vae_scale, do_convert_rgb=True, do_normalize=False)
