"""What a picture looks like before it is finished, at next to no cost.

Owns the estimate of the finished latents from one step, and a linear map from latents to colours in
place of the autoencoder. Knows nothing of requests. Legend: C H W latent channels and size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from PIL import Image

from rayjobs.diffusion.model import Model
from rayjobs.diffusion.modules.upload import Download
from rayjobs.diffusion.vae.latents import encode_moments, to_image

if TYPE_CHECKING:
    from rayjobs.diffusion.rows.row import Row

SWATCHES, CELLS, CELL = 4, 8, 4
"""Pictures of random colours that the map is fitted on: how many, cells a side, latents a cell."""


class Preview:
    """A picture whose latents are on their way to the host."""

    def __init__(self, z_CHW: torch.Tensor, colours: Callable[[], torch.Tensor]):
        self._latents = Download(z_CHW.float())
        self._colours = colours

    @property
    def is_ready(self) -> bool:
        """Whether to draw it waits for nothing."""
        return self._latents.is_over

    def draw(self) -> Image.Image:
        z_CHW, colours = self._latents.get(), self._colours()
        rgb_3HW = torch.einsum("cd,chw->dhw", colours[:-1], z_CHW) + colours[-1][:, None, None]
        return to_image(rgb_3HW.nan_to_num(0.5).clamp(0, 1))


class Previewer:
    """Pictures of latents, one pixel for each, for one model."""

    def __init__(self, model: Model):
        self.model = model

    def begin(self, row: Row) -> Preview | None:
        """What the row will look like, as far as its last step knows; None before the first."""
        if row.last_step is None:
            return None
        _ = self._swatches  # before the latents: what is queued later is not waited for
        return Preview(self.denoised(row)[0], lambda: self._colours)

    def denoised(self, row: Row) -> torch.Tensor:
        """The finished latents (1, C, H, W) that the last step's prediction amounts to.

        For noise predictions (arXiv 2010.02502, eq. 9), v (arXiv 2202.00512, appendix D) and EDM's
        preconditioning (arXiv 2206.00364, eq. 7), whatever the sampler: what the UNet saw has unit
        variance, and its timestep says how much of it is noise.
        """
        assert row.last_step is not None
        scheduler, (x_1CHW, output_1CHW, timestep) = row.sampler.scheduler, row.last_step
        if self.model.is_edm:
            sigma, data = (4 * timestep.double()).exp().item(), scheduler.config.sigma_data
            sign = -1 if scheduler.config.prediction_type == "v_prediction" else 1
            return (x_1CHW * data + sign * output_1CHW * sigma) * data / (sigma**2 + data**2) ** 0.5
        alpha = self._kept(scheduler, float(timestep))
        kind = scheduler.config.prediction_type
        if kind == "sample":
            return output_1CHW
        if kind == "v_prediction":
            return alpha**0.5 * x_1CHW - (1 - alpha) ** 0.5 * output_1CHW
        return (x_1CHW - (1 - alpha) ** 0.5 * output_1CHW) / max(alpha, 1e-4) ** 0.5

    def _kept(self, scheduler: object, timestep: float) -> float:
        """The share of the signal at a timestep, which may lie between two whole ones."""
        known = getattr(scheduler, "alphas_cumprod", self.model.scheduler.alphas_cumprod)
        place = min(max(timestep, 0.0), len(known) - 1.0)
        low = int(place)
        high = min(low + 1, len(known) - 1)
        return float(known[low] + (known[high] - known[low]) * (place - low))

    @cached_property
    def _swatches(self) -> tuple[torch.Tensor, Download]:
        """Random colours (B, 3, h, w), and scaled latents of them, so many a side for each."""
        generator = torch.Generator().manual_seed(0)
        shape = (SWATCHES, 3, CELLS, CELLS)
        cells = torch.rand(shape, generator=generator, dtype=torch.float32)
        factor = CELL * self.model.vae_scale
        pixels = cells.repeat_interleave(factor, 2).repeat_interleave(factor, 3) * 2 - 1
        mean, std = self.model.latents_mean_std
        means = [encode_moments(picture[None], self.model)[0] for picture in pixels]
        z_BCHW = (torch.cat(means) - mean) * self.model.vae.config.scaling_factor / std
        return cells, Download(z_BCHW.float())

    @cached_property
    def _colours(self) -> torch.Tensor:
        """(C + 1, 3): colours in 0..1 of scaled latents and a constant, by least squares."""
        cells, latents = self._swatches
        # The latents of a cell in its middle, where its neighbours have no say.
        z_BCHW = latents.get().unfold(2, CELL, CELL).unfold(3, CELL, CELL)[..., 1:3, 1:3]
        z_NC = z_BCHW.mean(dim=(-2, -1)).permute(0, 2, 3, 1).flatten(0, 2)
        known = torch.cat([z_NC, torch.ones(len(z_NC), 1, dtype=torch.float32)], dim=1)
        rgb_N3 = cells.permute(0, 2, 3, 1).flatten(0, 2)
        return torch.linalg.lstsq(known, rgb_N3).solution
