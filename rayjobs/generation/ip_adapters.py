"""The keys of a job's IP-Adapters, and the pictures that images refer to.

Owns their names, types and defaults. Imports neither torch nor ray.
"""

from pydantic import Field, model_validator

from rayjobs.config import Config


class IpAdapterConfig(Config):
    """An IP-Adapter, and the picture that each image refers to."""

    uri: str
    """The IP-Adapter: a safetensors file, local or s3://, for the model's family."""
    encoder: str
    """The image encoder that it was trained with: a folder of config.json and model.safetensors,
    local or s3://."""
    image: str | None = None
    """The picture, local or s3://, that all images refer to."""
    column: str | None = None
    """Or the column of the prompt file with each row's own; rows without a value have no such
    picture. Names are relative to that file."""
    scale: float = Field(default=1.0, allow_inf_nan=False)
    """How strongly it acts; 1 is as trained, 0 not at all."""

    @model_validator(mode="after")
    def _is_possible(self) -> "IpAdapterConfig":
        if (self.image is None) == (self.column is None):
            raise ValueError("give image, or column, and not both: which picture is referred to")
        return self
