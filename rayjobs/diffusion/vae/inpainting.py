"""Making part of a picture anew: each step's latents are blended with the known picture's.

Owns the mask in latents and in pixels. Knows nothing of requests or of batches. The blend is that
of diffusers' inpainting pipelines for UNets of four channels (RePaint without resampling,
arXiv 2201.09865).
"""

import torch
import torch.nn.functional as F
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from rayjobs.diffusion.model import Model
from rayjobs.diffusion.modules.upload import upload
from rayjobs.diffusion.sampler import Sampler


class Inpainting:
    """What one row keeps of its init image, and where.

    `mask` is white where the picture is made anew; `init_1CHW` is (1, 3, H, W) in -1..1. With
    `keep_pixels` the init image's own pixels come back where the mask is black.
    """

    known_1CHW: torch.Tensor
    """The init image's latents."""
    noise_1CHW: torch.Tensor
    """The noise that the row began with."""

    def __init__(self, mask: Image.Image, init_1CHW: torch.Tensor, keep_pixels: bool, model: Model):
        height, width = init_1CHW.shape[-2:]
        processor = VaeImageProcessor(
            vae_scale_factor=model.vae_scale, do_normalize=False, do_convert_grayscale=True
        )
        mode = "default" if mask.size == (width, height) else "crop"
        mask_11HW: torch.Tensor = processor.preprocess(mask, height, width, resize_mode=mode)
        size = (height // model.vae_scale, width // model.vae_scale)
        hard_11hw = F.interpolate((mask_11HW >= 0.5).float(), size=size)
        self.mask_11hw = upload(hard_11hw.to(model.dtype), model.device)
        self._over = (init_1CHW[0] / 2 + 0.5, mask_11HW[0]) if keep_pixels else None

    def blend(self, x_1CHW: torch.Tensor, sampler: Sampler) -> torch.Tensor:
        """The latents after a step, with the known picture at the next step's noise around."""
        known_1CHW = sampler.noised(self.known_1CHW, self.noise_1CHW)
        return ((1 - self.mask_11hw) * known_1CHW + self.mask_11hw * x_1CHW).to(x_1CHW.dtype)

    def finish(self, pixels_CHW: torch.Tensor) -> torch.Tensor:
        """The decoded picture (3, H, W) in 0..1, over the init image's own pixels if asked for."""
        if self._over is None:
            return pixels_CHW
        init_CHW, mask_1HW = (upload(each, pixels_CHW.device) for each in self._over)
        return (1 - mask_1HW) * init_CHW + mask_1HW * pixels_CHW
