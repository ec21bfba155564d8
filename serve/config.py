"""The configuration of a serving application.

Owns its keys, their types and defaults, and checks that need nothing but the file. Imports neither
torch nor ray, because it is read on any machine.
"""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from rayjobs.config import Config
from rayjobs.models.options import LoadOptions, SourceConfig
from rayjobs.provenance.keys import Provenance

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/*\s]+")
Kind = Literal["text-to-image", "image-to-image"]


def check_name(name: str) -> str:
    """The name, if it can be part of a URL and is not a path. Raises ValueError."""
    if not NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not a valid name; use letters, digits, . - and _, up to 100")
    return name


Name = Annotated[str, AfterValidator(check_name)]


class ModelConfig(SourceConfig, LoadOptions):
    name: Name
    """The name that requests use."""
    uri: str
    """`starter`, a diffusers folder or .safetensors file (local or s3://), a hub id, or an export
    of `dreambooth`."""
    preload: bool = True
    """Load the model when a replica starts, not at the first request."""
    hint: str | tuple[str, ...] | None = None
    """An example prompt, or several, shown on the web page."""


class LoraConfig(Config):
    name: Name
    """The name that requests use."""
    uri: str
    """A safetensors LoRA file, its folder, or an export of `dreambooth`."""
    base: str | None = None
    """The name of the model that it belongs to; without it, any model."""


class ControlConfig(Config):
    name: Name
    """The name that requests use."""
    uri: str
    """A ControlNet or T2I-Adapter: a diffusers folder of safetensors, local or s3://; or
    `starter`."""
    base: str | None = None
    """The name of the model that it is for; without it, any model that it fits."""


class IpAdapterConfig(Config):
    name: Name
    """The name that requests use."""
    uri: str
    """An IP-Adapter: a safetensors file, local or s3://."""
    encoder: str
    """The image encoder that it was trained with: a folder of config.json and model.safetensors."""
    base: str | None = None
    """The name of the model that it is for; without it, any model that it fits."""


class RegistryConfig(Config):
    uri: str | None = None
    """A folder of DreamBooth runs or exports, local or s3://; each is served under its name."""
    refresh_s: float = Field(default=10.0, gt=0)
    """Seconds between two looks for new exports."""


class EngineConfig(Config):
    max_rows: int = Field(default=8, ge=1)
    """Images of one size that can share a step."""
    deterministic: bool = False
    """Give a request the same bits whatever else is asked for: those that `generate` makes with
    guidance, `engine.batch_size` as max_rows, and threads as many as num_threads. Calls then have
    one shape, and take as long for one image as for max_rows; on a GPU each image has calls of its
    own."""
    max_step_s: float = Field(default=2.0, gt=0)
    """Seconds; batches are kept small enough, and sizes beyond a model's own whose single step
    takes longer are refused. A new request waits as long before it can join."""
    max_pending_s: float = Field(default=300.0, gt=0)
    """Seconds of work that may wait on a replica; further requests are refused with 429."""
    model_memory_gb: float | None = Field(default=None, gt=0)
    """GiB for weights; without it, 70 % of the replica's share of its GPU's memory, or half
    of the machine's."""
    max_loras: int = Field(default=64, ge=1)
    """LoRAs kept in memory for each model."""
    lora_memory_gb: float | None = Field(default=None, gt=0)
    """GiB for the LoRAs of each model, part of model_memory_gb; without it, a quarter of that."""
    control_memory_gb: float | None = Field(default=None, gt=0)
    """GiB for the ControlNets of each model, part of model_memory_gb; without it, a quarter of
    that."""
    ip_adapter_memory_gb: float | None = Field(default=None, gt=0)
    """GiB for the IP-Adapters of each model with their image encoders, part of model_memory_gb;
    without it, a quarter of that."""
    num_threads: int | None = Field(default=None, ge=1)
    """CPU threads; without it, as many as the replica's CPUs."""


class LimitsConfig(Config):
    """Limits of a request, checked before any work and before images are decoded."""

    max_pixels: int = Field(default=1536 * 1536, ge=64)
    """Width times height that a request may ask for. A size left out, the model's own or an edit's
    like its image, is not checked."""
    max_side: int = Field(default=2048, ge=8)
    """Largest width and height that a request may ask for, and of an edit, in pixels."""
    max_steps: int = Field(default=150, ge=1, le=1000)
    """Largest num_inference_steps."""
    max_n: int = Field(default=10, ge=1)
    """Images of one request; above 10 it has no effect."""
    max_prompt_chars: int = Field(default=4000, ge=1)
    """Characters of a prompt, and of a negative prompt."""
    max_loras: int = Field(default=8, ge=0)
    """LoRAs of one request."""
    max_lora_scale: float = Field(default=4.0, gt=0)
    """Largest absolute scale of a LoRA."""
    max_controls: int = Field(default=4, ge=0)
    """ControlNets of one request."""
    max_control_scale: float = Field(default=4.0, gt=0)
    """Largest absolute scale of a ControlNet."""
    max_ip_adapters: int = Field(default=4, ge=0)
    """IP-Adapters of one request."""
    max_ip_adapter_scale: float = Field(default=4.0, gt=0)
    """Largest absolute scale of an IP-Adapter."""
    max_guidance_scale: float = Field(default=50.0, gt=0)
    """Largest guidance_scale."""
    max_upload_bytes: int = Field(default=50 * 2**20, ge=1024)
    """Bytes of an uploaded image."""
    max_upload_pixels: int = Field(default=50_000_000, ge=64)
    """Width times height of an uploaded image."""
    max_deadline_s: float = Field(default=600.0, gt=0)
    """Seconds after which any request ends."""


class KeyConfig(Config):
    name: str
    """Whose key it is; limits and fair sharing are by this name."""
    key: str | None = None
    """The key itself; prefer sha256, which is safe to publish: Ray Serve logs what is here."""
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    """SHA-256 of the key in hex, from `printf %s KEY | sha256sum | cut -c1-64`."""
    max_concurrent: int = Field(default=64, ge=1)
    """Requests of this key in progress or waiting."""
    images_per_minute: float | None = Field(default=None, gt=0)
    """Images that this key may request per minute; without it, any number."""

    @model_validator(mode="after")
    def _one_secret(self) -> "KeyConfig":
        if (self.key is None) == (self.sha256 is None):
            raise ValueError(f"key {self.name!r}: set either key or sha256")
        if self.key is not None and len(self.key) < 16:
            raise ValueError(f"key {self.name!r} has fewer than 16 characters; make it longer")
        return self


class AuthConfig(Config):
    keys: tuple[KeyConfig, ...] = ()
    """API keys; without any, only requests from this machine are answered."""
    allow_anyone: bool = False
    """Answer requests without keys from any machine; for private networks."""
    hosts: tuple[str, ...] = ()
    """Without keys: the names by which this server is reached, such as images.example.org or
    *.example.org. IP addresses and names without a dot need no entry. Another name may be a
    foreign web page's, which its owner lets point at this server."""
    origins: tuple[str, ...] = ()
    """Other web pages' origins whose scripts may use the API (CORS), such as
    https://app.example.org; with keys also "*"."""

    @field_validator("origins")
    @classmethod
    def _valid_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if origin != "*" and not ORIGIN.fullmatch(origin):
                raise ValueError(f"{origin!r} is no origin; write it as https://app.example.org")
        return origins

    @model_validator(mode="after")
    def _not_everyone(self) -> "AuthConfig":
        if "*" in self.origins and not self.keys:
            raise ValueError(
                "origins has '*', so any web page could use this server; set keys, or name origins"
            )
        return self


class ScalingConfig(Config):
    min: int = Field(default=1, ge=0)
    """Fewest engine replicas; with 0, none runs while there are no requests."""
    max: int = Field(default=1, ge=1)
    """Most engine replicas."""
    target_s: float = Field(default=5.0, gt=0)
    """Seconds of pending work per engine replica; more work starts more replicas."""
    upscale_delay_s: float = Field(default=3.0, ge=0)
    """Seconds before replicas are added."""
    downscale_delay_s: float = Field(default=120.0, ge=0)
    """Seconds before replicas are removed."""
    num_gpus: float = Field(default=0.0, ge=0)
    """GPUs of an engine replica; with a fraction it keeps to that share of a GPU's memory."""
    num_cpus: float = Field(default=1.0, ge=0)
    """CPUs of an engine replica."""
    ingress: int = Field(default=1, ge=1)
    """Ingress replicas, for HTTP and image formats."""
    ingress_cpus: float = Field(default=0.1, ge=0)
    """CPUs of an ingress replica."""

    @model_validator(mode="after")
    def _ordered(self) -> "ScalingConfig":
        if self.max < self.min:
            raise ValueError(f"scaling.max is {self.max}, below scaling.min, {self.min}")
        return self


class SafetyConfig(Config):
    uri: str | None = None
    """An image classifier (folder, s3:// or hub id) that checks every finished image."""
    threshold: float = Field(default=0.5, gt=0, lt=1)
    """An image that is unsafe with a higher probability is not returned."""


class ResultsConfig(Config):
    uri: str | None = None
    """Where images are stored for response_format url: an s3:// folder."""
    expires_s: int = Field(default=3600, ge=60, le=7 * 86400)
    """Seconds for which such a link is valid; the image stays."""

    @field_validator("uri")
    @classmethod
    def _has_links(cls, uri: str | None) -> str | None:
        if uri is not None and not uri.startswith("s3://"):
            raise ValueError(f"{uri!r} has no links that expire; use an s3:// folder")
        return uri


class ServeConfig(Config):
    models: tuple[ModelConfig, ...] = ()
    """What is served by name."""
    default_model: str | None = None
    """The model of requests that name none; without it, the first."""
    aliases: dict[str, str] = Field(default_factory=dict)
    """Other names for models, for clients that send names of their own: {gpt-image-1: sdxl}."""
    loras: tuple[LoraConfig, ...] = ()
    """Adapters by name, for requests that ask for them."""
    controls: tuple[ControlConfig, ...] = ()
    """ControlNets by name, for requests that bring a picture to follow."""
    ip_adapters: tuple[IpAdapterConfig, ...] = ()
    """IP-Adapters by name, for requests that bring a picture to refer to."""
    registry: RegistryConfig = RegistryConfig()
    serves: tuple[Kind, ...] = ("text-to-image", "image-to-image")
    """Which requests this application serves; two applications may share them."""
    engine: EngineConfig = EngineConfig()
    limits: LimitsConfig = LimitsConfig()
    auth: AuthConfig = AuthConfig()
    scaling: ScalingConfig = ScalingConfig()
    safety: SafetyConfig = SafetyConfig()
    results: ResultsConfig = ResultsConfig()
    provenance: Provenance = Provenance()

    @model_validator(mode="after")
    def _consistent(self) -> "ServeConfig":
        named = (*self.models, *self.loras, *self.controls, *self.ip_adapters)
        names = [each.name for each in named]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"the name {name!r} is used twice; names must differ")
        if not self.models and self.registry.uri is None:
            raise ValueError("nothing to serve; set models or registry.uri")
        if self.default_model is not None and not self.registry.uri:
            known = [model.name for model in self.models]
            if self.default_model not in known:
                raise ValueError(
                    f"default_model is {self.default_model!r}; models has {', '.join(known)}"
                )
        self._check_aliases(names)
        if not self.serves:
            raise ValueError("serves is empty; set text-to-image, image-to-image, or both")
        return self

    def _check_aliases(self, names: list[str]) -> None:
        for alias, name in self.aliases.items():
            if alias in names:
                raise ValueError(f"aliases: {alias!r} is the name of a model or adapter already")
            if name not in names and not self.registry.uri:
                raise ValueError(f"aliases: {alias} is {name!r}; known are {', '.join(names)}")
