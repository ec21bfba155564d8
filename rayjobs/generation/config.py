"""The keys of a generation job.

Owns their names, types, defaults and the checks that need nothing but the file. Imports neither
torch nor ray.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from rayjobs.config import Config, Workers
from rayjobs.diffusion.economy.plan import check_guidance_interval
from rayjobs.diffusion.passes import MOST_PASSES
from rayjobs.diffusion.request import (
    MOST_STEPS,
    check_schedule,
    check_side,
    check_strength,
    num_scheduled,
)
from rayjobs.diffusion.text.syntax import PromptSyntax, check_syntax
from rayjobs.generation.controls import ControlConfig
from rayjobs.generation.ip_adapters import IpAdapterConfig
from rayjobs.generation.passes import PassConfig
from rayjobs.generation.prompts.templates import TemplateTexts, check_placeholders
from rayjobs.models.options import ModelConfig
from rayjobs.provenance.keys import Marking
from rayjobs.quality.kinds import ALIKE


class PromptsConfig(Config):
    inline: tuple[str, ...] = ()
    """Prompts written here."""
    uri: str | None = None
    """A txt, csv, tsv, jsonl (each also .gz) or parquet file, or a folder: of parquet files, or of
    PNGs with the parameters that they were made with, by the web UI or here."""
    column: str | None = None
    """The file's prompt column; without it `prompt`, in any case of letters."""
    syntax: PromptSyntax = "plain"
    """How prompts and negative ones are written: plain (as text, cut at 77 tokens), a1111 (of any
    length, with the web UI's weights) or a1111-no-norm."""
    templates: tuple[str, ...] = ()
    """Texts with {axis} placeholders, and {prompt} for each prompt of inline or uri."""
    axes: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Values of the templates' placeholders."""
    mode: Literal["product", "zip", "sample"] = "product"
    """How axes combine: every combination, the n-th value of each, or a random sample."""
    samples: int | None = Field(default=None, ge=1)
    """With mode sample: different combinations for each prompt and template."""
    sample_seed: int = Field(default=0, ge=0, lt=2**63)
    """Chooses the sample."""

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

    @field_validator("inline", "templates")
    @classmethod
    def _readable(cls, texts: tuple[str, ...]) -> tuple[str, ...]:
        for text in texts:
            if "\0" in text:
                raise ValueError(f"{text!r} has a NUL character; remove it")
        return texts

    @model_validator(mode="after")
    def _one_source(self) -> "PromptsConfig":
        if self.inline and self.uri:
            raise ValueError("give prompts.inline or prompts.uri, not both")
        if not (self.inline or self.uri or self.templates):
            raise ValueError("no prompts; give prompts.inline, prompts.uri or prompts.templates")
        if self.axes and not self.templates:
            raise ValueError("prompts.axes needs prompts.templates whose placeholders they fill")
        for name, values in self.axes.items():
            if not values:
                raise ValueError(f"prompts.axes.{name} has no values")
        if "prompt" in self.axes:
            raise ValueError("prompts.axes.prompt: {prompt} is for prompts; list them as inline")
        return self

    @model_validator(mode="after")
    def _is_supported(self) -> "PromptsConfig":
        values = [("axes", value) for values in self.axes.values() for value in values]
        texts = [("inline", text) for text in self.inline] + values
        for name, text in texts + [("templates", text) for text in self.templates]:
            check_syntax(f"{name}: {text!r:.80}", text, self.syntax)
        return self

    @model_validator(mode="after")
    def _go_together(self) -> "PromptsConfig":
        if self.samples is not None and self.mode != "sample":
            raise ValueError(f"prompts.samples needs prompts.mode sample, but it is {self.mode}")
        if self.mode == "sample" and self.samples is None:
            raise ValueError("prompts.mode sample needs prompts.samples, how many of each template")
        if self.mode == "sample" and not self.templates:
            raise ValueError("prompts.mode sample needs prompts.templates, whose axes it samples")
        check_placeholders(self.templates, self.axes, bool(self.inline or self.uri))
        TemplateTexts(self.templates, self.axes, self.mode, self.samples)
        return self


class SeedsConfig(Config):
    start: int = Field(default=0, ge=0, lt=2**63)
    """The first seed."""
    count: int = Field(default=1, ge=1)
    """Images for each prompt, with seeds start, start + 1, ..."""
    values: tuple[int, ...] = ()
    """Or these seeds for each prompt."""
    derive: int | None = Field(default=None, ge=1)
    """Or this many for each prompt, derived from job_seed, the prompt and their index."""
    job_seed: int = 0
    """What derived seeds are derived from."""

    @property
    def num(self) -> int:
        """Images for each prompt."""
        return self.derive or len(self.values) or self.count

    @model_validator(mode="after")
    def _fits(self) -> "SeedsConfig":
        # By value, not by what was written: a configuration read back has every key written.
        ways = {
            "start, count": (self.start, self.count) != (0, 1),
            "values": bool(self.values),
            "derive": self.derive is not None,
        }
        given = [name for name, is_given in ways.items() if is_given]
        if len(given) > 1:
            raise ValueError(f"give one of {' / '.join(given)}, not several")
        if self.start + self.count > 2**63:
            raise ValueError(f"seeds up to {self.start + self.count - 1} exceed 2**63 - 1")
        for seed in self.values:
            if not 0 <= seed < 2**63:
                raise ValueError(f"values has {seed}; a seed is in 0 .. 2**63 - 1")
        if len(set(self.values)) < len(self.values):
            raise ValueError("values has a seed twice, which would make an image twice")
        return self


class ParametersConfig(Config):
    """Parameter axes: every combination of what is listed here is made of each prompt."""

    sampler: tuple[str, ...] = ()
    """Sampler names."""
    steps: tuple[Annotated[int, Field(ge=1, le=1000)], ...] = ()
    """Denoising steps."""
    guidance_scale: tuple[Annotated[float, Field(ge=0, allow_inf_nan=False)], ...] = ()
    """Classifier-free guidance scales."""
    guidance_rescale: tuple[Annotated[float, Field(ge=0, le=1)], ...] = ()
    """Rescalings of guided noise."""
    guidance_interval: tuple[tuple[float, float], ...] = ()
    """Shares of the schedule between which there is guidance; [0, 1] is always."""
    cache_interval: tuple[Annotated[int, Field(ge=1, le=1000)], ...] = ()
    """Calls from one of the UNet's deep blocks to the next; 1 is always."""
    clip_skip: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Layers of the text encoders to skip."""
    negative_prompt: tuple[str, ...] = ()
    """What guidance steers away from."""
    width: tuple[int, ...] = ()
    """Pixels; zipped with height when both are given, so that they are sizes."""
    height: tuple[int, ...] = ()
    """Pixels."""
    strength: tuple[Annotated[float, Field(gt=0, le=1)], ...] = ()
    """How much of the schedule an init image goes through."""

    @property
    def axes(self) -> list[tuple[str, ...]]:
        """ImageNames of the keys that vary, slowest first; those of one axis vary together."""
        given = [name for name in type(self).model_fields if getattr(self, name)]
        sizes = {"width", "height"} <= set(given)
        names = [(name, "height") if sizes and name == "width" else (name,) for name in given]
        return [name for name in names if not (sizes and name == ("height",))]

    @model_validator(mode="after")
    def _values(self) -> "ParametersConfig":
        for name in ("width", "height"):
            for pixels in getattr(self, name):
                check_side(name, pixels)
        for interval in self.guidance_interval:
            check_guidance_interval(interval)
        if self.width and self.height and len(self.width) != len(self.height):
            raise ValueError("width and height are pairs; give as many of one as of the other")
        for names in self.axes:
            values = list(zip(*(getattr(self, name) for name in names), strict=True))
            if len(set(values)) < len(values):
                raise ValueError(
                    f"{' and '.join(names)}: a value is there twice, which would make an image "
                    "twice; remove one"
                )
        return self


ECONOMY = {"guidance_interval": None, "cache_interval": 1, "timesteps": None, "sigmas": None}
"""Keys, and their defaults, that locks, records and identities have only where they are given,
since many are older."""


def economy_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What of these keys decides pictures: where it is not the default, and only there."""
    return {k: settings[k] for k, usual in ECONOMY.items() if settings.get(k, usual) != usual}


class SamplerConfig(Config):
    name: str | None = None
    """A short name such as euler, or a class of rayjobs/diffusion/sampler_names.py; without it the
    model's own."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Config options of that class, and eta."""
    steps: int | None = Field(default=None, ge=1, le=1000)
    """Denoising steps. Without it 30, or the few that a distilled model is made for."""
    guidance_scale: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Classifier-free guidance; at most 1 is none. Without it the model's usual value."""
    guidance_rescale: float = Field(default=0.0, ge=0, le=1)
    """Rescaling of guided noise (arXiv 2305.08891)."""
    guidance_interval: tuple[float, float] | None = None
    """The shares of the schedule between which there is guidance, such as [0.2, 0.8] (arXiv
    2404.07724); without it there is from 0 to 1."""
    cache_interval: int = Field(default=1, ge=1, le=1000)
    """The UNet's deep blocks are computed at every n-th call, and what they gave is used again
    between (DeepCache, arXiv 2312.00858); 1 computes them always."""
    timesteps: tuple[int, ...] | None = None
    """A schedule of the job's own, such as [999, 749, 499, 249], for the samplers that take one;
    steps is then their number."""
    sigmas: tuple[float, ...] | None = None
    """The same as noise levels; the last one, often 0, is where the last step ends."""
    clip_skip: int | None = Field(default=None, ge=0)
    """Layers of the text encoders to skip."""
    negative_prompt: str | None = None
    """What guidance steers away from."""

    @property
    def own_steps(self) -> int | None:
        """Steps as given, or of the schedule."""
        own = num_scheduled(self.timesteps, self.sigmas)
        return self.steps if own is None else own

    @model_validator(mode="after")
    def _is_possible(self) -> "SamplerConfig":
        check_guidance_interval(self.guidance_interval)
        check_schedule(self.timesteps, self.sigmas, self.steps)
        return self


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
    format: Literal["parquet", "webdataset", "folder"] = "parquet"
    """The shards' format: parquet, tar files, or folders of pictures with metadata.jsonl."""
    image_format: Literal["png", "webp", "webp-lossless", "jpeg"] = "png"
    """The pictures' format."""
    quality: int = Field(default=95, ge=1, le=100)
    """Of jpeg and webp pictures."""
    images_per_shard: int = Field(default=64, ge=1)
    """Records in a shard; two to ten minutes of a worker's time is a good size."""
    most_images: int = Field(default=1_000_000, ge=1)
    """A larger job is refused: raise this to confirm that it is meant."""
    license: str | None = None
    """Of the images, for the data set's card, such as openrail++."""
    control_images: bool = Field(default=False, exclude_if=lambda given: not given)
    """Store the pictures of `controls` beside each image, as large as it: those of the first are in
    the column conditioning_image, of the second in conditioning_image_2."""
    provenance: Marking = Field(default=Marking(), exclude_if=lambda value: value == Marking())


class EngineConfig(Config):
    batch_size: int = Field(default=8, ge=1)
    """The canonical batch shape: images denoised together. Part of each image's identity."""
    fuse_loras: bool = False
    """Put the job's LoRAs into the model's weights: as fast as without any, and other last bits.
    Part of each image's identity."""
    allow_class_change: bool = False
    """Let workers of another determinism class go on with a data set; their shards are marked."""


class WorkersConfig(Workers):
    attempts: int = Field(default=3, ge=1, le=100)
    """Crashes of workers at a shard before its records are made one by one to find the culprit."""


def _is_none(value: Any) -> bool:
    return value is None


class QualityConfig(Config):
    """Scores stored with each record, never applied here: filters act at export."""

    clip: str | None = None
    """A CLIP model (folder, s3:// or hub id) for `clip_score`, the cosine of prompt and picture."""
    aesthetic: str | None = None
    """A safetensors file with the predictor's linear layers, over the clip model's embedding."""
    safety: str | None = None
    """An image classifier (folder, s3:// or hub id) for `unsafe_score`."""
    pick: str | None = Field(default=None, exclude_if=_is_none)
    """A CLIP model of PickScore's for `pick_score`, the cosine times the model's logit scale."""
    hps: str | None = Field(default=None, exclude_if=_is_none)
    """A CLIP model of HPSv2's, as transformers has them, for `hps_score`, the cosine."""
    embedding: bool = Field(default=False, exclude_if=lambda given: not given)
    """Store the clip model's embedding of each picture, of length 1, and look for pictures that
    show the same."""
    alike: float = Field(default=ALIKE, ge=0.5, lt=1, exclude_if=lambda cosine: cosine == ALIKE)
    """The cosine of two embeddings from which on their pictures show the same."""
    caption: str | None = Field(default=None, exclude_if=_is_none)
    """An image-to-text model (folder, s3:// or hub id; BLIP, BLIP-2, GIT or an encoder-decoder) for
    `caption`, what it says of the picture."""

    @model_validator(mode="after")
    def _needs(self) -> "QualityConfig":
        if self.aesthetic is not None and self.clip is None:
            raise ValueError("quality.aesthetic needs quality.clip, whose embedding it reads")
        if self.embedding and self.clip is None:
            raise ValueError("quality.embedding needs quality.clip, whose embedding it stores")
        if self.alike != ALIKE and not self.embedding:
            raise ValueError("quality.alike needs quality.embedding, which it compares")
        return self


class GenerateConfig(Config):
    model: ModelConfig
    prompts: PromptsConfig
    seeds: SeedsConfig = SeedsConfig()
    sampler: SamplerConfig = SamplerConfig()
    parameters: ParametersConfig = ParametersConfig()
    image: ImageConfig = ImageConfig()
    init: InitConfig = InitConfig()
    controls: tuple[ControlConfig, ...] = Field(default=(), exclude_if=lambda given: not given)
    """ControlNets, each with a picture that images are to follow."""
    ip_adapters: tuple[IpAdapterConfig, ...] = Field(default=(), exclude_if=lambda given: not given)
    """IP-Adapters, each with a picture that images refer to."""
    passes: tuple[PassConfig, ...] = Field(
        default=(), max_length=MOST_PASSES, exclude_if=lambda given: not given
    )
    """What each image goes through after it is made first."""
    quality: QualityConfig = QualityConfig()
    output: OutputConfig
    engine: EngineConfig = EngineConfig()
    workers: WorkersConfig = WorkersConfig()

    @model_validator(mode="after")
    def _together(self) -> "GenerateConfig":
        steps = min(self.parameters.steps or (self.sampler.own_steps or MOST_STEPS,))
        if self.init.uri is not None:
            check_strength(min(self.parameters.strength or (self.init.strength,)), steps)
        for number, each in enumerate(self.passes):
            try:
                if each.denoising_start is None:
                    check_strength(each.asked.own_strength, each.steps or steps)
            except ValueError as error:
                raise ValueError(f"passes.{number}: {error}") from None
        for name in ("timesteps", "sigmas"):
            if self.parameters.steps and getattr(self.sampler, name) is not None:
                raise ValueError(f"sampler.{name} and parameters.steps are both given; remove one")
        for text in (self.sampler.negative_prompt or "", *self.parameters.negative_prompt):
            check_syntax(f"negative_prompt: {text!r:.80}", text, self.prompts.syntax, negative=True)
        if self.output.control_images and not self.controls:
            raise ValueError("output.control_images is given without controls; leave it out")
        if (
            self.controls
            and max(self.parameters.cache_interval or (self.sampler.cache_interval,)) > 1
        ):
            raise ValueError(
                "controls and cache_interval are both given; controls act on the blocks that "
                "cache_interval leaves out, so leave one of them out"
            )
        return self
