"""What a model's configuration says of the pictures it makes: family, side, EDM, usual guidance.

Owns these rules, for a model in memory as for one of which only the files were read. Imports
neither torch nor diffusers.
"""

from collections.abc import Mapping
from typing import Any

from rayjobs.diffusion.sampler_names import EDM

FAMILIES = {
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusionXLImg2ImgPipeline": "sdxl",
    "StableDiffusionPipeline": "sd",
    "StableDiffusionImg2ImgPipeline": "sd",
}
"""By the class of a model's pipeline."""


def is_edm(scheduler_class: str) -> bool:
    """Whether the UNet was trained with EDM preconditioning, as Playground v2.5 was."""
    return scheduler_class in EDM


def vae_scale(vae: Mapping[str, Any]) -> int:
    """Pixels per latent, along a side."""
    return int(2 ** (len(vae.get("block_out_channels", [0] * 4)) - 1))


def default_side(unet: Mapping[str, Any], vae: Mapping[str, Any]) -> int:
    """Pixels along a side of the pictures that the model was trained on."""
    return int(unet.get("sample_size", 128)) * vae_scale(vae)


def default_guidance_scale(family: str, edm_model: bool) -> float:
    """What each family's makers recommend: Playground v2.5, SDXL and Stable Diffusion."""
    return 3.0 if edm_model else 5.0 if family == "sdxl" else 7.5
