"""Between pictures and latents: noise from a seed, an init image's encoding, decoding to pixels.

Owns the scaling conventions of each family's autoencoder. Knows nothing of rows or of denoising.
"""

from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from rayjobs.diffusion.model import Model
from rayjobs.diffusion.modules.upload import Uploading, upload


def draw_noise(
    generator: torch.Generator, shape_CHW: tuple[int, int, int], model: Model
) -> torch.Tensor:
    """Standard normal (1, C, H, W), drawn on the CPU so that a seed means the same everywhere."""
    noise_1CHW = torch.randn((1, *shape_CHW), generator=generator, dtype=model.dtype)
    return upload(noise_1CHW, model.device)


def fitted(image: Image.Image, width: int, height: int, model: Model) -> torch.Tensor:
    """(1, 3, H, W) in -1..1; an image of another size is scaled to cover and cropped centrally."""
    processor = VaeImageProcessor(vae_scale_factor=model.vae_scale)
    mode = "default" if image.size == (width, height) else "crop"
    x_1CHW: torch.Tensor = processor.preprocess(image, height, width, resize_mode=mode)
    return x_1CHW


@torch.no_grad()
def encode_moments(x_1CHW: torch.Tensor, model: Model) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log variance of the autoencoder's posterior, (1, C, h, w) each, not scaled."""
    posterior = _posterior(x_1CHW, model)
    return posterior.mean, posterior.logvar


@torch.no_grad()
def encode_image(x_1CHW: torch.Tensor, generator: torch.Generator, model: Model) -> torch.Tensor:
    """Scaled latents (1, C, h, w), sampled from the autoencoder's posterior."""
    posterior = _posterior(x_1CHW, model)
    mean, std = model.latents_mean_std
    with Uploading():
        z_1CHW = posterior.sample(generator)
    z_1CHW = (z_1CHW - mean) * model.vae.config.scaling_factor / std
    return z_1CHW.to(model.dtype)


def _posterior(x_1CHW: torch.Tensor, model: Model) -> Any:
    return model.vae.encode(upload(x_1CHW.to(model.vae.dtype), model.device)).latent_dist


@torch.no_grad()
def decode_latents(z_BCHW: torch.Tensor, model: Model) -> torch.Tensor:
    """Pixels (B, 3, H, W) float32 in 0..1, on the model's device."""
    mean, std = model.latents_mean_std
    z_BCHW = z_BCHW.to(model.vae.dtype)
    z_BCHW = z_BCHW * std / model.vae.config.scaling_factor + mean
    if model.compiled is not None and model.compiled.takes_decoding(z_BCHW):
        x_BCHW = model.compiled.decode(z_BCHW)
    else:
        x_BCHW = model.vae.decode(z_BCHW, return_dict=False)[0]
    return (x_BCHW.float() / 2 + 0.5).clamp(0, 1)


def to_image(pixels_CHW: torch.Tensor) -> Image.Image:
    """An 8-bit RGB picture of float pixels in 0..1.

    Rounded where they are: a quarter of the bytes travels.
    """
    pixels = (pixels_CHW.permute(1, 2, 0) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.contiguous().cpu().numpy())
