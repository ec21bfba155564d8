"""The keys of a job's passes: what each image goes through after it is made first.

Owns their names, types and defaults. Imports neither torch nor ray.
"""

from typing import Any

from pydantic import Field, model_validator

from rayjobs.config import Config
from rayjobs.diffusion.passes import MOST_SCALE, Pass, Via
from rayjobs.models.options import optional


class PassConfig(Config):
    """A pass that makes each image anew, larger, from what the pass before made."""

    scale: float = Field(default=1.0, ge=1, le=MOST_SCALE)
    """How many times as wide and high, to the nearest multiples of 8."""
    via: Via = "pixel"
    """What is made larger: the picture (pixel), or its latents, which is faster and blurs."""
    strength: float | None = Field(default=None, gt=0, le=1)
    """How much of the schedule the pass goes through; without it 0.4."""
    steps: int | None = Field(default=None, ge=1, le=1000)
    """Denoising steps of the whole schedule; without it the image's own."""
    sampler: str | None = None
    """Without it the image's own."""
    sampler_options: dict[str, Any] | None = None
    """Config options of that class, and eta; without it, and without sampler, the job's."""
    guidance_scale: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Without it the image's own."""
    guidance_rescale: float | None = Field(default=None, ge=0, le=1)
    """Without it the image's own."""

    model: str | None = optional()
    """Another model that makes it, such as an SDXL refiner: a diffusers folder or .safetensors file
    (local or s3://), or a hub id. The job's LoRAs, controls and IP-Adapters are not for it."""
    denoising_start: float | None = Field(
        default=None, gt=0, lt=1, exclude_if=lambda share: share is None
    )
    """Instead of strength, for such a model: the share of the schedule at which the pass before
    ends and this one goes on with its latents as they are, such as 0.8."""

    @model_validator(mode="after")
    def _is_possible(self) -> "PassConfig":
        self.asked.check_start()
        return self

    @property
    def asked(self) -> Pass:
        """As the engine is asked for it."""
        return Pass(**dict(self))
