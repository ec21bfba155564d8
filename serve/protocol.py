"""Messages between the ingress and the engine replicas.

Owns the request and the events that answer it. Knows neither torch, Ray nor HTTP: these are plain
data, pickled and sent between processes.
"""

from dataclasses import dataclass
from typing import Literal

from rayjobs.diffusion.text.syntax import PromptSyntax


@dataclass(frozen=True, eq=False)
class Pixels:
    """An image as bytes, row by row: RGB, or L with one byte for each pixel."""

    width: int
    height: int
    data: bytes
    mode: Literal["RGB", "L"] = "RGB"


@dataclass(frozen=True, kw_only=True, eq=False)
class ControlUse:
    """A ControlNet of a request, by its name in the registry, and the picture to follow."""

    name: str
    pixels: Pixels
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    preprocess: str | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class IpAdapterUse:
    """An IP-Adapter of a request, by its name in the registry, and the picture to refer to."""

    name: str
    pixels: Pixels
    scale: float = 1.0


@dataclass(frozen=True, kw_only=True, eq=False)
class ImagesRequest:
    """One call of the API: `len(seeds)` images that differ only in their seeds.

    `model` and `loras` are names in the registry. With `init` it is image-to-image; `mask` (L, of
    init's size) is how much of each pixel changes: 255 all, 0 nothing. None is the model's default.
    """

    id: str
    caller: str
    """An API key's name or an address; waiting callers share the engine fairly."""
    model: str
    prompt: str
    negative_prompt: str | None = None
    prompt_syntax: PromptSyntax = "plain"
    seeds: tuple[int, ...] = (0,)
    steps: int = 30
    sampler: str | None = None
    guidance_scale: float | None = None
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float] | None = None
    cache_interval: int = 1
    timesteps: tuple[int, ...] | None = None
    """With these or `sigmas`, `steps` is their number."""
    sigmas: tuple[float, ...] | None = None
    clip_skip: int | None = None
    width: int | None = None
    height: int | None = None
    init: Pixels | None = None
    mask: Pixels | None = None
    strength: float = 0.5
    loras: tuple[tuple[str, float], ...] = ()
    controls: tuple[ControlUse, ...] = ()
    ip_adapters: tuple[IpAdapterUse, ...] = ()
    partial_images: int = 0
    """Previews of each image, evenly over its steps."""
    progress: bool = False
    """Whether step events, and more than one waiting event, are wanted."""
    deadline_s: float | None = None
    """Seconds from the request's arrival after which the answer is not wanted."""
    warnings: tuple[str, ...] = ()
    """Said with every image: what of the request was passed over."""

    @property
    def has_schedule(self) -> bool:
        """Whether the sampler's steps are the caller's own."""
        return self.timesteps is not None or self.sigmas is not None

    @property
    def names(self) -> list[str]:
        """Of all in the registry that it needs."""
        nets = (use.name for use in (*self.controls, *self.ip_adapters))
        return [self.model, *(name for name, _ in self.loras), *nets]


@dataclass(frozen=True)
class Waiting:
    """No step of any image has been made. The first one tells that the request is accepted."""

    position: int
    """Requests before this one."""
    seconds: float
    """Estimated time until its first step."""


@dataclass(frozen=True)
class Step:
    """A step of an image has been made."""

    image: int
    done: int
    total: int
    seconds_left: float


@dataclass(frozen=True)
class Partial:
    """A preview of an unfinished image."""

    image: int
    index: int
    pixels: Pixels


@dataclass(frozen=True)
class Finished:
    """A finished image."""

    image: int
    seed: int
    pixels: Pixels
    warnings: tuple[str, ...] = ()
    text_tokens: int = 0
    """Of the prompts, as the model's first tokenizer counts them."""


@dataclass(frozen=True)
class Failed:
    """The end of a request without all of its images.

    invalid: it can never be served. busy: retry after `retry_after_s`. deadline: too late.
    refused: blocked by the safety checker. broken: the engine failed.
    """

    kind: Literal["invalid", "busy", "deadline", "refused", "broken"]
    message: str
    param: str | None = None
    retry_after_s: float | None = None


TOO_LATE = Failed("deadline", "the deadline passed before the images were ready", "deadline_s")
Event = Waiting | Step | Partial | Finished | Failed
