"""The keys of a job's controls: ControlNets, and the pictures that images are to follow.

Owns their names, types and defaults. Imports neither torch nor ray.
"""

from typing import Literal

from pydantic import Field, model_validator

from rayjobs.config import Config
from rayjobs.diffusion.request import check_control


class ControlConfig(Config):
    """A ControlNet, and the picture that each image is to follow."""

    uri: str
    """The ControlNet or T2I-Adapter: a diffusers folder of safetensors, local or s3://, for the
    model's family; or `starter`, which follows outlines with the starter model."""
    image: str | None = None
    """The picture, local or s3://, that all images follow."""
    column: str | None = None
    """Or the column of the prompt file with each row's own; rows without a value have no such
    control. Names are relative to that file."""
    scale: float = Field(default=1.0, allow_inf_nan=False)
    """How strongly it acts; 1 is as trained."""
    start: float = Field(default=0.0, ge=0, le=1)
    """The share of the schedule at which it sets in."""
    end: float = Field(default=1.0, ge=0, le=1)
    """The share of the schedule at which it ends."""
    preprocess: Literal["canny"] | None = Field(default=None, exclude_if=lambda way: way is None)
    """What is drawn out of the picture for the ControlNet: edges, by OpenCV's Canny with thresholds
    of 100 and 200, at the image's size. Needs the extra `canny`."""

    @model_validator(mode="after")
    def _is_possible(self) -> "ControlConfig":
        if (self.image is None) == (self.column is None):
            raise ValueError("give image, or column, and not both: which picture is to be followed")
        check_control(self.scale, self.start, self.end)
        return self
