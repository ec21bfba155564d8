"""What the ingress and the engine replicas say to each other.

Owns the words of an ask and of the events that answer it. Knows neither torch, Ray nor HTTP; what
is here is pickled and sent between processes, so it is plain data.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, eq=False)
class Pixels:
    """A picture as bytes, row by row: RGB, or L with one byte for each pixel."""

    width: int
    height: int
    data: bytes
    mode: Literal["RGB", "L"] = "RGB"


@dataclass(frozen=True, kw_only=True, eq=False)
class Ask:
    """One call of the API: `len(seeds)` images that differ in their seeds only.

    `model` and `loras` are names in the registry. With `init` it is image-to-image; `mask` (L, of
    init's size) says how much of each pixel is to be made anew: 255 all, 0 nothing. None stands for
    the model's own value.
    """

    id: str
    caller: str
    """Whose turn it is when several wait: an API key's name, or an address."""
    model: str
    prompt: str
    negative_prompt: str | None = None
    seeds: tuple[int, ...] = (0,)
    steps: int = 30
    sampler: str | None = None
    guidance_scale: float | None = None
    guidance_rescale: float = 0.0
    clip_skip: int | None = None
    width: int | None = None
    height: int | None = None
    init: Pixels | None = None
    mask: Pixels | None = None
    strength: float = 0.5
    loras: tuple[tuple[str, float], ...] = ()
    partial_images: int = 0
    """Previews of each image, evenly over its steps."""
    progress: bool = False
    """Whether waiting and steps are to be told."""
    deadline_s: float | None = None
    """Seconds from the ask's arrival after which nobody wants the answer."""


@dataclass(frozen=True)
class Waiting:
    """No step of any image is made yet."""

    position: int
    """Asks that are before this one."""
    seconds: float
    """Until its first step, as far as can be told."""


@dataclass(frozen=True)
class Step:
    """A step of an image is made."""

    image: int
    done: int
    total: int
    seconds_left: float


@dataclass(frozen=True)
class Partial:
    """What an image looks like by now."""

    image: int
    index: int
    pixels: Pixels


@dataclass(frozen=True)
class Finished:
    """An image."""

    image: int
    seed: int
    pixels: Pixels
    warnings: tuple[str, ...] = ()
    text_tokens: int = 0
    """Of the prompts, as the model's first tokenizer counts them."""


@dataclass(frozen=True)
class Failed:
    """The end of an ask that has none of its images, or not all.

    invalid: the ask cannot be served, whatever the time. busy: come again in `retry_after_s`.
    deadline: too late. refused: the safety checker's word. broken: the engine's own fault.
    """

    kind: Literal["invalid", "busy", "deadline", "refused", "broken"]
    message: str
    param: str | None = None
    retry_after_s: float | None = None


Event = Waiting | Step | Partial | Finished | Failed
