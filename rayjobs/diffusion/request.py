"""What a caller asks of the engine and what it gets back.

Owns the words of a request and the checks that need no model. Knows neither torch nor diffusers, so
a front end can build requests without loading either.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rayjobs.diffusion.economy.plan import check_cache_interval, check_guidance_interval
from rayjobs.diffusion.text.syntax import PromptSyntax, check_syntax
from rayjobs.images.edges import check_preprocess

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

MOST_STEPS = 1000
"""The noise levels that all models of the family were trained on."""
LEVELS = {
    "timesteps": f"a whole number in 0 .. {MOST_STEPS - 1}",
    "sigmas": "a number of at least 0",
}
"""What each of a request's own timesteps or sigmas must be."""

SIZE_MULTIPLE = 8
"""Width and height must be divisible by this, as in diffusers' pipelines."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Lora:
    """One adapter of a request: a local safetensors file (or its folder) and its strength."""

    path: str
    scale: float = 1.0

    def check(self) -> None:
        """Raise ValueError for a scale that is no number."""
        if not isinstance(self.scale, int | float) or not math.isfinite(self.scale):
            raise ValueError(f"the scale of a LoRA is {self.scale!r}; it must be a number")


@dataclass(frozen=True, kw_only=True, eq=False)
class Control:
    """One ControlNet of a request: its local diffusers folder, a picture that it is to follow (a
    PIL image, encoded bytes or a local path), its strength, and the shares of the request's calls
    between which it is on, as `control_guidance_start` and `_end` of diffusers' pipelines.

    With `preprocess` the ControlNet follows what that draws out of the picture: edges, of `canny`.
    """

    path: str
    image: Image | bytes | str
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    preprocess: str | None = None

    def check(self) -> None:
        """Raise ValueError for a scale, shares or a way to draw that are none."""
        check_control(self.scale, self.start, self.end)
        check_preprocess(self.preprocess)


@dataclass(frozen=True, kw_only=True, eq=False)
class IpAdapter:
    """One IP-Adapter of a request: its local safetensors file, the local folder of the CLIP image
    encoder that it was trained with, a picture that it refers to (a PIL image, encoded bytes or a
    local path), and its strength, as `set_ip_adapter_scale` of diffusers' pipelines."""

    path: str
    encoder: str
    image: Image | bytes | str
    scale: float = 1.0

    def check(self) -> None:
        """Raise ValueError for a scale that is no number."""
        check_reference_scale(self.scale)


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """One image to make.

    `sampler` is a short name (`rayjobs.diffusion.sampler.SAMPLERS`) or a diffusers class name;
    without one the model's own is used. `sampler_options` are that class's config options, and
    `eta`. Without `steps` there are 30, or the few that a distilled model is made for; as many as
    there are `timesteps`, or one less than `sigmas`, where a sampler is given its own schedule, as
    diffusers' pipelines take it.
    `guidance_scale` above 1 costs a second slot in every UNet call; without one the family's usual
    value is used. With a `guidance_interval` it is there only from one share of the schedule to
    another (arXiv 2404.07724). With a `cache_interval` of n the UNet's deep blocks are computed
    at every n-th call, and what they gave is used again between (arXiv 2312.00858).
    `width` and `height` are pixels; without them they are the init image's, else the model's.
    `init_image` (a PIL image, encoded bytes, or a local path) makes the request
    image-to-image; `strength` in (0, 1] says how much of the schedule it goes through. With a
    `mask` (of the same kinds; white is made anew, black stays; with an alpha channel, transparent
    is made anew) each step's latents are blended with the init image's, noised alike, as diffusers'
    inpainting pipelines do for UNets of four channels; `keep_unmasked` then puts the init image's
    own pixels back where the mask is black.
    `controls` are ControlNets with their pictures, which are stretched to the request's size.
    `ip_adapters` are IP-Adapters with the pictures that they refer to, whatever their size.
    `negative_prompt` None and "" differ for SDXL models, as in diffusers. `prompt_syntax` is how
    both are written: `plain`, or with the web UI's weights and of any length.
    """

    prompt: str
    negative_prompt: str | None = None
    prompt_syntax: PromptSyntax = "plain"
    seed: int = 0
    steps: int | None = None
    sampler: str | None = None
    sampler_options: Mapping[str, Any] = field(default_factory=dict)
    guidance_scale: float | None = None
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float] | None = None
    cache_interval: int = 1
    timesteps: tuple[int, ...] | None = None
    sigmas: tuple[float, ...] | None = None
    clip_skip: int | None = None
    width: int | None = None
    height: int | None = None
    init_image: Image | bytes | str | None = None
    strength: float = 0.5
    mask: Image | bytes | str | None = None
    keep_unmasked: bool = False
    loras: tuple[Lora, ...] = ()
    controls: tuple[Control, ...] = ()
    ip_adapters: tuple[IpAdapter, ...] = ()

    @property
    def own_steps(self) -> int | None:
        """Steps that the request itself says: their number, or that of its schedule."""
        own = num_scheduled(self.timesteps, self.sigmas)
        return self.steps if own is None else own

    def check(self) -> None:
        """Raise ValueError naming the first value that no model could serve."""
        check_text("prompt", self.prompt)
        check_text("negative_prompt", self.negative_prompt or "")
        check_syntax("prompt", self.prompt, self.prompt_syntax)
        check_syntax(
            "negative_prompt", self.negative_prompt or "", self.prompt_syntax, negative=True
        )
        if self.steps is not None and not 1 <= self.steps <= MOST_STEPS:
            raise ValueError(f"steps is {self.steps}; it must be in 1 .. {MOST_STEPS}")
        check_schedule(self.timesteps, self.sigmas, self.steps)
        check_guidance_interval(self.guidance_interval)
        check_cache_interval(self.cache_interval)
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}; it must be in 0 .. 2**63 - 1")
        for name in ("width", "height"):
            check_side(name, getattr(self, name))
        for part in (*self.loras, *self.controls, *self.ip_adapters):
            part.check()
        for name in ("guidance_scale", "guidance_rescale"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"{name} is {value}; it must be a number of at least 0")
        if self.clip_skip is not None and self.clip_skip < 0:
            raise ValueError(f"clip_skip is {self.clip_skip}; it must be at least 0")
        if self.init_image is not None:
            check_strength(self.strength, self.own_steps or MOST_STEPS)
        elif self.mask is not None:
            raise ValueError("a mask needs an init_image, of which it says what is made anew")


def check_text(name: str, text: object) -> None:
    """Raise ValueError unless `text` is a string that can be written as UTF-8."""
    if not isinstance(text, str):
        raise ValueError(f"{name} must be text, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} is not valid text: {error.reason}") from None


def check_side(name: str, pixels: int | None) -> None:
    """Raise ValueError unless `pixels` is None or a positive multiple of 8."""
    if pixels is None or (pixels > 0 and pixels % SIZE_MULTIPLE == 0):
        return
    near = max(SIZE_MULTIPLE, round(pixels / SIZE_MULTIPLE) * SIZE_MULTIPLE)
    raise ValueError(
        f"{name} is {pixels}; it must be a multiple of {SIZE_MULTIPLE}, such as {near}"
    )


def check_strength(strength: float, steps: int) -> None:
    """Raise ValueError unless image-to-image at `strength` leaves at least one step."""
    if not 0 < strength <= 1:
        raise ValueError(f"strength is {strength}; it must be above 0 and at most 1")
    if int(strength * steps) < 1:
        raise ValueError(
            f"strength {strength} of {steps} steps leaves no step to make; "
            f"raise strength to at least {1 / steps:.3g} or steps to {int(1 / strength) + 1}"
        )


def check_control(scale: float, start: float, end: float) -> None:
    """Raise ValueError unless a control has a number and two ascending shares of the schedule."""
    if not isinstance(scale, int | float) or not math.isfinite(scale):
        raise ValueError(f"the scale of a control is {scale!r}; it must be a number")
    if not 0 <= start < end <= 1:
        raise ValueError(
            f"a control goes from {start} to {end}; start and end must be shares of the schedule, "
            "the smaller one first, such as 0 and 0.6"
        )


def check_reference_scale(scale: float) -> None:
    """Raise ValueError unless an IP-Adapter's scale is a number."""
    if not isinstance(scale, int | float) or not math.isfinite(scale):
        raise ValueError(f"the scale of an IP-Adapter is {scale!r}; it must be a number")


def check_schedule(
    timesteps: Sequence[int] | None, sigmas: Sequence[float] | None, steps: int | None
) -> None:
    """Raise ValueError unless a schedule, if there is one, falls from step to step."""
    if timesteps is not None and sigmas is not None:
        raise ValueError("timesteps and sigmas are both given; leave one out")
    name, values = ("sigmas", sigmas) if timesteps is None else ("timesteps", timesteps)
    num = num_scheduled(timesteps, sigmas)
    if values is None or num is None:
        return
    for value in values:
        if not _is_level(name, value):
            raise ValueError(f"{name} has {value!r}; each must be {LEVELS[name]}")
    for before, after in itertools.pairwise(values):
        if after >= before:
            raise ValueError(f"{name} has {after} after {before}; each must be below the last")
    if num < 1:
        ends = "" if name == "timesteps" else " and, last, where it ends"
        raise ValueError(f"{name} is {list(values)}; give at least that of one step{ends}")
    if steps is not None and steps != num:
        raise ValueError(f"steps is {steps}, but {name} are of {num}; leave steps out")


def num_scheduled(timesteps: Sequence[int] | None, sigmas: Sequence[float] | None) -> int | None:
    """Steps of a schedule, where there is one: the last sigma, often 0, is the end of the last."""
    if timesteps is not None:
        return len(timesteps)
    return None if sigmas is None else len(sigmas) - 1


def _is_level(name: str, value: object) -> bool:
    if name == "timesteps":
        return isinstance(value, int) and 0 <= value < MOST_STEPS
    return isinstance(value, int | float) and 0 <= value < math.inf


@dataclass(frozen=True, kw_only=True, eq=False)
class Result:
    """One finished request: the same `request` object, and an image or the reason there is none.

    `pixels` is float32 (3, H, W) in 0..1 before rounding to 8 bits, kept only when asked for.
    `warnings` say what was not done as asked, such as a prompt cut at the encoder's length.
    """

    id: int
    request: Request
    image: Image | None = None
    error: str | None = None
    pixels: torch.Tensor | None = None
    warnings: tuple[str, ...] = ()
