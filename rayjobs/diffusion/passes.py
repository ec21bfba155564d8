"""What a request goes through after its first picture: each pass draws the last one's anew, larger.

Owns a pass's words, their checks, and which request a pass amounts to. Knows neither torch nor how
a row is made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from rayjobs.diffusion.request import MOST_STEPS, Request, check_strength

Via = Literal["pixel", "latent"]
Way = Literal["pixel", "latent", "as is"]
"""How a pass takes over what the one before made."""
MOST_PASSES = 4
MOST_SCALE = 8.0
STRENGTH = 0.4
KEPT = ("steps", "sampler", "sampler_options", "guidance_scale", "guidance_rescale")
"""Settings of a request that a pass may have of its own; the others are the request's."""
OF_BASE: dict[str, Any] = {"loras": (), "controls": (), "ip_adapters": ()}
"""What of a request is for its own model alone."""
HANDED_OVER = ("strength", "sampler", "sampler_options")
"""What a pass by `denoising_start` has none of: that of the pass before goes on."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Pass:
    """One pass after the first: image-to-image from what the pass before made.

    That is made `scale` times as large, to the nearest multiples of 8: as a picture (`pixel`, of 8
    bits, by Lanczos' filter) or as latents (`latent`, bilinearly). `strength` says how much of the
    schedule the pass goes through. What is None is as in the request; where a pass has steps or a
    sampler of its own, the request's own schedule, or its sampler's options, are not for it. Noise
    comes from the request's own generator, which goes on where the pass before left it: as from one
    generator that is given to two calls of diffusers' pipelines.

    With a `model`, the local path of an SDXL refiner or of another base model, the pass is that
    one's: the request's LoRAs, controls and IP-Adapters are not for it. It may instead begin at
    `denoising_start`, a share of the schedule, at which the pass before ends: its latents are then
    handed over as they are, noise and all, as in diffusers' ensemble of experts.
    """

    scale: float = 1.0
    strength: float | None = None
    """Without one, STRENGTH."""
    via: Via = "pixel"
    steps: int | None = None
    sampler: str | None = None
    sampler_options: Mapping[str, Any] | None = None
    guidance_scale: float | None = None
    guidance_rescale: float | None = None
    model: str | None = None
    denoising_start: float | None = None

    @property
    def own(self) -> dict[str, Any]:
        """Settings of its own, where the request has others."""
        return {name: value for name in KEPT if (value := getattr(self, name)) is not None}

    @property
    def own_strength(self) -> float:
        """As given, else STRENGTH."""
        return STRENGTH if self.strength is None else self.strength

    @property
    def way(self) -> Way:
        return self.via if self.denoising_start is None else "as is"

    def check(self, request: Request, number: int) -> None:
        """Raise ValueError, naming the pass, for what no model could make of this request."""
        if number >= MOST_PASSES:
            raise ValueError(f"passes has more than {MOST_PASSES}; leave out those beyond")
        try:
            self._check_own(request)
            settings = replace(self.settings(request, None, None), passes=())
            if self.denoising_start is None:
                check_strength(settings.strength, settings.own_steps or MOST_STEPS)
            settings.check()
        except ValueError as error:
            raise ValueError(f"passes.{number}: {error}") from None

    def _check_own(self, request: Request) -> None:
        if not isinstance(self.scale, int | float) or not 1 <= self.scale <= MOST_SCALE:
            raise ValueError(f"scale is {self.scale!r}; it must be in 1 .. {MOST_SCALE:g}")
        if self.via not in get_args(Via):
            raise ValueError(f"via is {self.via!r}; it must be pixel or latent")
        self.check_start()
        if self.denoising_start is not None and request.mask is not None:
            raise ValueError("denoising_start goes on without the mask; use strength instead")
        if self.via == "latent" and request.mask is not None:
            raise ValueError("via is latent, but a mask needs the picture; take via pixel")

    def check_start(self) -> None:
        """Raise ValueError for what does not go with `denoising_start`."""
        share = self.denoising_start
        if share is None:
            return
        if not isinstance(share, int | float) or not 0 < share < 1:
            raise ValueError(f"denoising_start is {share!r}; it must be between 0 and 1")
        if self.model is None:
            raise ValueError("denoising_start needs a model, such as a refiner, which goes on then")
        for name in HANDED_OVER:
            if getattr(self, name) is not None:
                raise ValueError(f"denoising_start and {name} are both given; leave one out")
        if self.scale != 1 or self.via != "pixel":
            name = "via" if self.scale == 1 else "scale"
            raise ValueError(f"denoising_start hands latents over as they are; leave {name} out")

    def size(self, width: int, height: int, multiple: int) -> tuple[int, int]:
        """Width and height of what it makes of a picture of this size."""
        if self.denoising_start is not None:
            return width, height
        across, down = (
            max(1, round(side * self.scale / multiple)) * multiple for side in (width, height)
        )
        return across, down

    def settings(self, before: Request, width: int | None, height: int | None) -> Request:
        """The request that this pass amounts to, beside what it begins from."""
        own = self.own if self.model is None else self.own | OF_BASE
        if self.steps is not None:
            own |= {"timesteps": None, "sigmas": None}
        if self.sampler is not None and self.sampler_options is None:
            own["sampler_options"] = {}
        return replace(before, width=width, height=height, strength=self.own_strength, **own)


def final_size(
    passes: Sequence[Pass], width: int, height: int, multiple: int = 8
) -> tuple[int, int]:
    """Width and height of the last pass's picture, where the first one's are these."""
    for each in passes:
        width, height = each.size(width, height, multiple)
    return width, height
