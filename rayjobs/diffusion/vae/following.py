"""From what one pass made to what the next one begins with: larger latents, or a larger picture.

Owns how both are made larger. Knows nothing of which passes there are.
"""

import torch
import torch.nn.functional as F
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from rayjobs.diffusion.model import Model
from rayjobs.diffusion.vae.worker import NOT_FINITE


def resized_latents(z_1CHW: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
    """Scaled latents of this shape (C, h, w), bilinearly."""
    if not torch.isfinite(z_1CHW).all():
        raise ValueError(NOT_FINITE)
    if z_1CHW.is_cuda:
        # Made on the stream of the steps: not to be reused there while this one reads them.
        z_1CHW.record_stream(torch.cuda.current_stream(z_1CHW.device))
    if z_1CHW.shape[1:] == shape:
        return z_1CHW
    larger = F.interpolate(z_1CHW.float(), size=shape[1:], mode="bilinear", align_corners=False)
    return larger.to(z_1CHW.dtype)


def resized_picture(image: Image.Image, width: int, height: int, model: Model) -> torch.Tensor:
    """(1, 3, H, W) in -1..1 of a picture stretched to this size by Lanczos' filter, as diffusers'
    image processor does."""
    processor = VaeImageProcessor(vae_scale_factor=model.vae_scale)
    x_1CHW: torch.Tensor = processor.preprocess(image, height, width)
    return x_1CHW
