"""Making part of a picture anew, as diffusers' inpainting pipelines do.

Owns the mask in latents and in pixels, and what follows from it: for UNets of four channels each
step's latents are blended with the known picture's (RePaint without resampling, arXiv 2201.09865);
those of nine channels see the mask and the rest of the picture at every step. Knows nothing of
requests or of batches.
"""

import torch
import torch.nn.functional as F
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from rayjobs.diffusion.facts import LATENTS
from rayjobs.diffusion.model import Model
from rayjobs.diffusion.modules.upload import upload
from rayjobs.diffusion.sampler import Sampler
from rayjobs.diffusion.vae.latents import draw_noise, encode_image


class Inpainting:
    """What one row keeps of its init image, and where.

    `mask` is white where the picture is made anew; `init_1CHW` is (1, 3, H, W) in -1..1. With
    `keep_pixels` the init image's own pixels come back where the mask is black.
    """

    known_1CHW: torch.Tensor
    """The init image's latents."""
    noise_1CHW: torch.Tensor
    """The noise that the row began with."""
    inputs_1CHW: torch.Tensor | None = None
    """What a UNet of nine channels gets beside the latents."""

    def __init__(self, mask: Image.Image, init_1CHW: torch.Tensor, keep_pixels: bool, model: Model):
        height, width = init_1CHW.shape[-2:]
        processor = VaeImageProcessor(
            vae_scale_factor=model.vae_scale, do_normalize=False, do_convert_grayscale=True
        )
        mode = "default" if mask.size == (width, height) else "crop"
        mask_11HW: torch.Tensor = processor.preprocess(mask, height, width, resize_mode=mode)
        size = (height // model.vae_scale, width // model.vae_scale)
        hard_11HW = mask_11HW >= 0.5
        hard_11hw = F.interpolate(hard_11HW.float(), size=size)
        self.mask_11hw = upload(hard_11hw.to(model.dtype), model.device)
        self._masked_1CHW = init_1CHW * ~hard_11HW if model.needs_mask else None
        self._over = (init_1CHW[0] / 2 + 0.5, mask_11HW[0]) if keep_pixels else None

    def begin(
        self,
        init_1CHW: torch.Tensor,
        strength: float,
        sampler: Sampler,
        generator: torch.Generator,
        model: Model,
    ) -> torch.Tensor:
        """The row's first latents, drawing from the generator as diffusers does."""
        _, _, height, width = self.mask_11hw.shape
        shape = (LATENTS, height, width)
        masked_1CHW, self._masked_1CHW = self._masked_1CHW, None
        if masked_1CHW is None or strength < 1:
            self.known_1CHW = encode_image(init_1CHW, generator, model)
        self.noise_1CHW = draw_noise(generator, shape, model)
        if masked_1CHW is None:
            # diffusers encodes the masked image too, which UNets of four channels do not read.
            draw_noise(generator, shape, model)
        else:
            masked_1CHW = encode_image(masked_1CHW, generator, model)
            self.inputs_1CHW = torch.cat([self.mask_11hw, masked_1CHW], dim=1)
        if strength == 1:
            return sampler.start(self.noise_1CHW)
        return sampler.noised(self.known_1CHW, self.noise_1CHW)

    def input(self, x_1CHW: torch.Tensor) -> torch.Tensor:
        """What the UNet takes: the latents, or of nine channels the mask and the picture too."""
        if self.inputs_1CHW is None:
            return x_1CHW
        return torch.cat([x_1CHW, self.inputs_1CHW], dim=1)

    def blend(self, x_1CHW: torch.Tensor, sampler: Sampler) -> torch.Tensor:
        """The latents after a step; for UNets of four channels with the known picture at the next
        step's noise around."""
        if self.inputs_1CHW is not None:
            return x_1CHW
        known_1CHW = sampler.noised(self.known_1CHW, self.noise_1CHW)
        return ((1 - self.mask_11hw) * known_1CHW + self.mask_11hw * x_1CHW).to(x_1CHW.dtype)

    def finish(self, pixels_CHW: torch.Tensor) -> torch.Tensor:
        """The decoded picture (3, H, W) in 0..1, over the init image's own pixels if asked for."""
        if self._over is None:
            return pixels_CHW
        init_CHW, mask_1HW = (upload(each, pixels_CHW.device) for each in self._over)
        return (1 - mask_1HW) * init_CHW + mask_1HW * pixels_CHW
