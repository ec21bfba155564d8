"""The keys of a serving application.

Owns their names, types, defaults and the checks that need nothing but the file. Imports neither
torch nor ray: `serve run` reads it wherever it is started.
"""

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from rayjobs.config import Config, HowToLoad

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
Kind = Literal["text-to-image", "image-to-image"]


class ModelConfig(HowToLoad):
    name: str
    """What callers say."""
    uri: str
    """`starter`, a diffusers folder or .safetensors file (local or s3://), a hub id, or an export
    of `dreambooth`."""
    config: str | None = None
    """For a single file: a diffusers folder with its configs and tokenizers; else from the hub."""
    preload: bool = True
    """Load it when a replica starts, not at its first request."""
    hint: str | None = None
    """A prompt to try, shown on the page."""

    @field_validator("name")
    @classmethod
    def _sayable(cls, name: str) -> str:
        return check_name(name)


class LoraConfig(Config):
    name: str
    """What callers say."""
    uri: str
    """A safetensors LoRA file, its folder, or an export of `dreambooth`."""
    base: str | None = None
    """The model that it is for; without it any."""

    @field_validator("name")
    @classmethod
    def _sayable(cls, name: str) -> str:
        return check_name(name)


class RegistryConfig(Config):
    uri: str | None = None
    """A folder of DreamBooth runs or exports, local or s3://: each is served under its name."""
    refresh_s: float = Field(default=10.0, gt=0)
    """How often it is looked through for new ones."""


class EngineConfig(Config):
    max_rows: int = Field(default=8, ge=1)
    """Images of one size that share a step."""
    max_step_s: float = Field(default=2.0, gt=0)
    """Calls are made no larger than this: it is how long a newcomer waits to join."""
    max_pending_s: float = Field(default=300.0, gt=0)
    """Seconds of work that may wait on a replica; more is refused with 429."""
    model_memory_gb: float | None = Field(default=None, gt=0)
    """For weights; without it 70 % of the GPU's memory, or half of the machine's."""
    max_loras: int = Field(default=64, ge=1)
    """Adapters kept beside each model."""
    num_threads: int | None = Field(default=None, ge=1)
    """On a CPU; without it as many as the replica's CPUs."""


class LimitsConfig(Config):
    """Checked before any work, and before any picture is decoded."""

    max_pixels: int = Field(default=1536 * 1536, ge=64)
    """Of an image made."""
    max_side: int = Field(default=2048, ge=8)
    """Pixels of the width or height of an image made."""
    max_steps: int = Field(default=150, ge=1, le=1000)
    """Denoising steps."""
    max_n: int = Field(default=10, ge=1)
    """Images of one request."""
    max_prompt_chars: int = Field(default=4000, ge=1)
    """Characters of a prompt."""
    max_loras: int = Field(default=8, ge=0)
    """Of one request."""
    max_lora_scale: float = Field(default=4.0, gt=0)
    """Of an adapter's scale, either sign."""
    max_guidance_scale: float = Field(default=50.0, gt=0)
    """Of guidance_scale."""
    max_upload_bytes: int = Field(default=50 * 2**20, ge=1024)
    """Of a picture sent."""
    max_upload_pixels: int = Field(default=50_000_000, ge=64)
    """Of a picture sent, once decoded."""
    max_deadline_s: float = Field(default=600.0, gt=0)
    """No request is worked on for longer."""


class KeyConfig(Config):
    name: str
    """Whose key it is; limits and turns are by name."""
    key: str | None = None
    """The key itself; better sha256, which may be read by anybody."""
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    """SHA-256 of the key, in hex: `printf %s KEY | sha256sum`."""
    max_concurrent: int = Field(default=64, ge=1)
    """Requests of this key that are worked on or wait."""
    images_per_minute: float | None = Field(default=None, gt=0)
    """More are refused with 429; without it there is no such limit."""

    @model_validator(mode="after")
    def _given(self) -> "KeyConfig":
        if (self.key is None) == (self.sha256 is None):
            raise ValueError(f"key {self.name!r}: give key or sha256, one of them")
        if self.key is not None and len(self.key) < 16:
            raise ValueError(f"key {self.name!r} has fewer than 16 characters; make it longer")
        return self


class AuthConfig(Config):
    keys: tuple[KeyConfig, ...] = ()
    """Without any, only callers on this machine are answered."""
    allow_anyone: bool = False
    """Answer all the world without keys, for networks that are closed by other means."""


class ScalingConfig(Config):
    min: int = Field(default=1, ge=0)
    """Engine replicas; 0 lets all of them go when nothing is asked."""
    max: int = Field(default=1, ge=1)
    """Engine replicas at most."""
    target_s: float = Field(default=5.0, gt=0)
    """Seconds of waiting work for each replica that is wanted."""
    upscale_delay_s: float = Field(default=3.0, ge=0)
    """More replicas must be wanted for so long before they are started."""
    downscale_delay_s: float = Field(default=120.0, ge=0)
    """Fewer replicas must be wanted for so long before some are stopped."""
    num_gpus: float = Field(default=0.0, ge=0)
    """GPUs of an engine replica."""
    num_cpus: float = Field(default=1.0, ge=0)
    """CPUs of an engine replica."""
    ingress: int = Field(default=1, ge=1)
    """Ingress replicas: HTTP and picture formats."""
    ingress_cpus: float = Field(default=0.1, ge=0)
    """CPUs of an ingress replica."""

    @model_validator(mode="after")
    def _ordered(self) -> "ScalingConfig":
        if self.max < self.min:
            raise ValueError(f"scaling.max is {self.max}, below scaling.min, {self.min}")
        return self


class SafetyConfig(Config):
    uri: str | None = None
    """An image classifier (folder, s3:// or hub id) that every picture is shown to."""
    threshold: float = Field(default=0.5, gt=0, lt=1)
    """A picture that is unsafe with a higher probability is not handed out."""


class ResultsConfig(Config):
    uri: str | None = None
    """Where pictures go for response_format url: an s3:// folder."""
    expires_s: int = Field(default=3600, ge=60, le=7 * 86400)
    """How long such a link is good."""


class ServeConfig(Config):
    models: tuple[ModelConfig, ...] = ()
    """What is served by name."""
    default_model: str | None = None
    """For requests that name none; without it the first."""
    loras: tuple[LoraConfig, ...] = ()
    """Adapters by name, for requests that ask for them."""
    registry: RegistryConfig = RegistryConfig()
    serves: tuple[Kind, ...] = ("text-to-image", "image-to-image")
    """What this application answers; two applications may share the work."""
    engine: EngineConfig = EngineConfig()
    limits: LimitsConfig = LimitsConfig()
    auth: AuthConfig = AuthConfig()
    scaling: ScalingConfig = ScalingConfig()
    safety: SafetyConfig = SafetyConfig()
    results: ResultsConfig = ResultsConfig()

    @model_validator(mode="after")
    def _together(self) -> "ServeConfig":
        names = [each.name for each in (*self.models, *self.loras)]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"the name {name!r} is there twice; names are what callers say")
        if not self.models and self.registry.uri is None:
            raise ValueError("nothing to serve; give models or registry.uri")
        if self.default_model is not None and not self.registry.uri:
            known = [model.name for model in self.models]
            if self.default_model not in known:
                raise ValueError(
                    f"default_model is {self.default_model!r}; models has {', '.join(known)}"
                )
        if not self.serves:
            raise ValueError("serves is empty; give text-to-image, image-to-image, or both")
        return self


def check_name(name: str) -> str:
    """A name that can be said in a URL and is no path."""
    if not NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} is no name; use letters, digits, dot, dash and underscore, up to 100"
        )
    return name
