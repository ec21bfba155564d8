"""The keys of a generation job.

Owns their names, types, defaults and the checks that need nothing but the file. Imports neither
torch nor ray.
"""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from rayjobs.config import Config
from rayjobs.diffusion.request import check_side, check_strength


class LoraConfig(Config):
    uri: str
    """A safetensors LoRA file or its folder, local or s3://."""
    scale: float = 1.0
    """How strongly it acts; 1 is as trained."""


class ModelConfig(Config):
    uri: str
    """`starter`, a diffusers folder or .safetensors file (local or s3://), or a hub id."""
    config: str | None = None
    """For a single file: a diffusers folder with its configs and tokenizers; else from the hub."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """auto: float32 on a CPU, bfloat16 on a GPU."""
    device: str = "auto"
    """auto, cpu or cuda."""
    vae_dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """auto: as dtype, but float32 where the autoencoder overflows in float16."""
    attention: Literal["auto", "math", "flash", "efficient", "cudnn"] = "auto"
    """torch's scaled-dot-product kernel."""
    channels_last: bool = True
    """Memory format of the convolutions; the other one is slower on CPUs and GPUs alike."""
    compile: Literal["no", "blocks", "full"] = "no"
    """torch.compile of the UNet: each repeated block once, or the whole."""
    vae_slicing: bool = False
    """Decode in slices, for less memory."""
    vae_tiling: bool = False
    """Decode in tiles, for less memory at large sizes."""
    loras: tuple[LoraConfig, ...] = ()
    """Adapters applied to every image."""


class PromptsConfig(Config):
    inline: tuple[str, ...] = ()
    """Prompts written here."""
    uri: str | None = None
    """A txt, csv, tsv, jsonl or parquet file of prompts, local or s3://."""
    column: str | None = None
    """The file's prompt column; without it `prompt`, in any case of letters."""
    templates: tuple[str, ...] = ()
    """Texts with {axis} places, and {prompt} for each prompt of inline or uri."""
    axes: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Words for the templates' places; every combination is made."""

    @field_validator("inline", "templates", mode="before")
    @classmethod
    def _one_or_more(cls, texts: Any) -> Any:
        return (texts,) if isinstance(texts, str) else texts

    @field_validator("axes", mode="before")
    @classmethod
    def _as_text(cls, axes: Any) -> Any:
        if not isinstance(axes, dict):
            return axes
        return {k: tuple(map(str, v)) if isinstance(v, list) else v for k, v in axes.items()}

    @model_validator(mode="after")
    def _one_source(self) -> "PromptsConfig":
        if self.inline and self.uri:
            raise ValueError("give prompts.inline or prompts.uri, not both")
        if not (self.inline or self.uri or self.templates):
            raise ValueError("no prompts; give prompts.inline, prompts.uri or prompts.templates")
        if self.axes and not self.templates:
            raise ValueError("prompts.axes needs prompts.templates to put the words into")
        for name, words in self.axes.items():
            if not words:
                raise ValueError(f"prompts.axes.{name} has no words")
        return self


class SeedsConfig(Config):
    start: int = Field(default=0, ge=0, lt=2**63)
    """The first seed."""
    count: int = Field(default=1, ge=1)
    """Images for each prompt, with seeds start, start + 1, ..."""

    @model_validator(mode="after")
    def _fits(self) -> "SeedsConfig":
        if self.start + self.count > 2**63:
            raise ValueError(f"seeds up to {self.start + self.count - 1} exceed 2**63 - 1")
        return self


class SamplerConfig(Config):
    name: str | None = None
    """A short name such as euler, or a diffusers class name; without it the model's own."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Config options of that class, and eta."""
    steps: int = Field(default=30, ge=1, le=1000)
    """Denoising steps."""
    guidance_scale: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Classifier-free guidance; at most 1 is none. Without it the model family's usual value."""
    guidance_rescale: float = Field(default=0.0, ge=0, le=1)
    """Rescaling of guided noise (arXiv 2305.08891)."""
    clip_skip: int | None = Field(default=None, ge=0)
    """Layers of the text encoders to skip."""
    negative_prompt: str | None = None
    """What guidance steers away from."""


class ImageConfig(Config):
    width: int | None = None
    """Pixels; without it the model's own size."""
    height: int | None = None
    """Pixels; without it the model's own size."""

    @field_validator("width", "height")
    @classmethod
    def _divisible(cls, value: int | None) -> int | None:
        check_side("it", value)
        return value


class InitConfig(Config):
    uri: str | None = None
    """A folder of pictures, local or s3://: every one is used with every prompt."""
    strength: float = Field(default=0.5, gt=0, le=1)
    """How much of the schedule an init image goes through."""


class OutputConfig(Config):
    uri: str
    """The data set's folder, local or s3://."""
    format: Literal["parquet"] = "parquet"
    """The shards' format."""
    image_format: Literal["png"] = "png"
    """The pictures' format."""
    images_per_shard: int = Field(default=64, ge=1)
    """Records in a shard; two to ten minutes of a worker's time is a good size."""


class EngineConfig(Config):
    batch_size: int = Field(default=8, ge=1)
    """The canonical batch shape: images denoised together. Part of each image's identity."""


class WorkersConfig(Config):
    min: int = Field(default=1, ge=1)
    """Workers to start with."""
    max: int | None = Field(default=None, ge=1)
    """Workers to grow to; without it as many as min."""
    num_gpus: float = Field(default=0.0, ge=0)
    """GPUs of a worker; a fraction puts several workers on one."""
    num_cpus: float = Field(default=1.0, gt=0)
    """CPUs of a worker, and its number of threads."""

    @model_validator(mode="after")
    def _ordered(self) -> "WorkersConfig":
        if self.max is not None and self.max < self.min:
            raise ValueError(f"workers.max is {self.max}, below workers.min, {self.min}")
        return self


class GenerateConfig(Config):
    model: ModelConfig
    prompts: PromptsConfig
    seeds: SeedsConfig = SeedsConfig()
    sampler: SamplerConfig = SamplerConfig()
    image: ImageConfig = ImageConfig()
    init: InitConfig = InitConfig()
    output: OutputConfig
    engine: EngineConfig = EngineConfig()
    workers: WorkersConfig = WorkersConfig()

    @model_validator(mode="after")
    def _together(self) -> "GenerateConfig":
        if self.init.uri is not None:
            check_strength(self.init.strength, self.sampler.steps)
        return self
