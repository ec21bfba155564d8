"""The keys that say which model is loaded, and how.

Owns their names, types and defaults. Imports neither torch nor ray.
"""

from typing import Any, Literal

from pydantic import Field

from rayjobs.config import Config

Dtype = Literal["auto", "float32", "float16", "bfloat16"]
Attention = Literal["auto", "math", "flash", "efficient", "cudnn"]


def optional(default: Any = None) -> Any:
    """A key that is written down only where it is given: locks of before it are still the same."""
    return Field(default=default, exclude_if=lambda value: value is None)


class SourceConfig(Config):
    """Which model, and what its files do not say themselves."""

    uri: str
    """`starter`, a diffusers folder or .safetensors file (local or s3://), or a hub id."""
    config: str | None = None
    """For a single file: a diffusers folder (local or s3://) or hub id with its configs and
    tokenizers; without it they are fetched from the hub."""
    base: str | None = optional()
    """For a file that holds only a UNet, or lacks the autoencoder or text encoders: the whole model
    (a diffusers folder, local or s3://, or a hub id) that has the rest."""
    revision: str | None = optional()
    """Branch, tag or commit of a hub id; without it the newest."""
    prediction_type: Literal["epsilon", "v_prediction"] | None = optional()
    """What the UNet predicts, for files that do not say it, or say it wrongly."""

    @property
    def details(self) -> dict[str, Any]:
        """The keys that are given beside the uri."""
        return {n: v for n in SourceConfig.model_fields if (v := getattr(self, n)) and n != "uri"}


class LoadOptions(Config):
    """How a model's weights are held: speed and memory, but not what they draw."""

    dtype: Dtype = "auto"
    """auto: float32 on a CPU, bfloat16 on a GPU."""
    device: str = "auto"
    """auto, cpu or cuda."""
    vae_dtype: Dtype = "auto"
    """auto: as dtype; where the autoencoder overflows in float16, bfloat16 on GPUs that have it and
    float32 elsewhere."""
    attention: Attention = "auto"
    """The UNet's scaled-dot-product kernel, one of torch's."""
    channels_last: Literal["auto"] | bool = "auto"
    """Memory format of the convolutions. auto: the faster one, which is this one on a CPU and in
    what is compiled."""
    compile: Literal["no", "blocks", "full"] = "no"
    """torch.compile of the UNet: each kind of block once, or the whole, for the sizes that are
    known at the start. On a GPU the autoencoder's decoder, too."""
    compile_cache: str | None = optional()
    """Folder (local or s3://) for what was compiled, from which the next process starts; without
    it, one of this machine. It holds code: whoever can write there can run code here."""
    vae_slicing: bool = False
    """Decode in slices, for less memory."""
    vae_tiling: bool = False
    """Decode in tiles, for less memory at large sizes."""


class LoraConfig(Config):
    uri: str
    """A safetensors LoRA file or its folder, local or s3://."""
    scale: float = Field(default=1.0, allow_inf_nan=False)
    """How strongly it acts; 1 is as trained."""


class WordConfig(Config):
    uri: str
    """A safetensors file of learned embeddings (textual inversion) or its folder."""
    word: str
    """The word in prompts that they stand for."""


class ModelConfig(SourceConfig, LoadOptions):
    loras: tuple[LoraConfig, ...] = ()
    """Adapters applied to every image."""
    words: tuple[WordConfig, ...] = ()
    """Words that the text encoders are taught."""
