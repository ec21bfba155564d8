"""One API request in progress: its rows, their remaining steps and the previews still to send.

Owns the conversion from an API request to the engine's requests and from results to events. Knows
nothing of threads or of other requests.
"""

import asyncio
import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from PIL import Image

from rayjobs.diffusion.control.bank import ControlNet
from rayjobs.diffusion.economy.plan import count_slots, plan_calls
from rayjobs.diffusion.ip_adapter.bank import LoadedIpAdapter
from rayjobs.diffusion.passes import final_size
from rayjobs.diffusion.request import Control, IpAdapter, Lora, Request
from serve.engine.models import LATENT_CHANNELS, LoadedModel
from serve.images import to_image, to_pixels
from serve.protocol import Event, Failed, Finished, ImagesRequest
from serve.tracing import Stages


@dataclass(eq=False)
class RequestState:
    """Belongs to the engine's thread once submitted; the event loop reads only `events`."""

    request: ImagesRequest
    loaded: LoadedModel
    events: asyncio.Queue[Event]
    loras: tuple[Lora, ...] = ()
    controls: tuple[ControlNet, ...] = ()
    """Of the request's controls, in their order."""
    ip_adapters: tuple[LoadedIpAdapter, ...] = ()
    arrived_s: float = field(default_factory=time.monotonic)
    shape: tuple[int, ...] = (0, 0, 0)
    """Of its first pass."""
    shapes: set[tuple[int, ...]] = field(default_factory=set)
    """Of all its passes."""
    images: dict[int, int] = field(default_factory=dict)
    """The image number of each unfinished row, by row id."""
    left: dict[int, float] = field(default_factory=dict)
    """Slots times steps left, by row id; fewer where guidance pauses or features are reused."""
    preview_steps: dict[int, list[int]] = field(default_factory=dict)
    """Steps after which a preview of each row is sent, the next one first."""
    slots: int = 1
    """Of each row in a batch, at most."""
    num_partials: int = 0
    """Previews of each image: as many as requested, or as there are steps for."""
    started: bool = False
    notified_s: float | None = None
    """When its caller last got a waiting event."""
    over: bool = False
    stages: Stages = field(default_factory=lambda: Stages("wait"))
    """Where it is, for tracing."""

    @property
    def deadline_s(self) -> float:
        seconds = self.request.deadline_s
        return float("inf") if seconds is None else self.arrived_s + seconds

    @property
    def slot_steps(self) -> float:
        return sum(self.left.values())

    def engine_requests(self) -> list[Request]:
        """The engine's requests, one for each image."""
        request = self.request
        controls = tuple(
            Control(
                path=net.path,
                image=to_image(use.pixels),
                scale=use.scale,
                start=use.start,
                end=use.end,
                preprocess=use.preprocess,
            )
            for net, use in zip(self.controls, request.controls, strict=True)
        )
        return [
            Request(
                prompt=request.prompt,
                negative_prompt=request.negative_prompt,
                prompt_syntax=request.prompt_syntax,
                seed=seed,
                steps=None if request.has_schedule else request.steps,
                sampler=request.sampler,
                guidance_scale=request.guidance_scale,
                guidance_rescale=request.guidance_rescale,
                guidance_interval=request.guidance_interval,
                cache_interval=request.cache_interval,
                timesteps=request.timesteps,
                sigmas=request.sigmas,
                clip_skip=request.clip_skip,
                width=request.width,
                height=request.height,
                init_image=None if request.init is None else to_image(request.init),
                strength=request.strength,
                mask=None if request.mask is None else to_image(request.mask),
                keep_unmasked=request.mask is not None,
                loras=self.loras,
                controls=controls,
                ip_adapters=self._references(),
                passes=request.passes,
            )
            for seed in request.seeds
        ]

    def _references(self) -> tuple[IpAdapter, ...]:
        return tuple(
            IpAdapter(path=path, encoder=encoder, image=to_image(use.pixels), scale=use.scale)
            for (path, encoder), use in zip(
                (net.key for net in self.ip_adapters), self.request.ip_adapters, strict=True
            )
        )

    def enter(self, row_id: int, image: int, row: Any) -> None:
        """Record a row that the engine has accepted."""
        _, total = row.progress
        self.images[row_id] = image
        self.shape = row.shape
        self.shapes = {each.shape for each in row.rows}
        self.slots = max(len(each.said) for each in row.rows)
        self.note_left(row_id, row)
        # No preview after the last step: the finished image follows.
        self.num_partials = count = min(self.request.partial_images, max(0, total - 1))
        self.preview_steps[row_id] = [round(total * (n + 1) / (count + 1)) for n in range(count)]

    def note_left(self, row_id: int, row: Any) -> None:
        """Record what is left to do of a row, in slots of the first pass's shape."""
        larger = row.area / (self.shape[1] * self.shape[2])
        self.left[row_id] = row.slots_left * larger

    def finish(self, row_id: int, image: Image.Image, warnings: tuple[str, ...]) -> Finished:
        number = self.images[row_id]
        self.leave(row_id)
        self.over = not self.images
        seed, pixels = self.request.seeds[number], to_pixels(image)
        return Finished(number, seed, pixels, warnings, self._text_tokens)

    @cached_property
    def _text_tokens(self) -> int:
        tokenizer = self.loaded.engine.model.tokenizers[0]
        texts = [self.request.prompt, self.request.negative_prompt or ""]
        return sum(len(tokenizer(text, add_special_tokens=False).input_ids) for text in texts)

    def leave(self, row_id: int) -> None:
        for by_row in (self.images, self.left, self.preview_steps):
            by_row.pop(row_id, None)

    def fail(self, failed: Failed) -> Failed:
        self.over = True
        return failed


def largest_shape(request: ImagesRequest, default_side: int, scale: int) -> tuple[int, ...]:
    """Of the latents of its last pass."""
    return _shape(final_size(request.passes, *_size(request, default_side), scale), scale)


def _shape(size: tuple[int, int], scale: int) -> tuple[int, ...]:
    return (LATENT_CHANNELS, size[1] // scale, size[0] // scale)


def _size(request: ImagesRequest, default_side: int) -> tuple[int, int]:
    """Width and height of its first pass."""
    width = request.width or (request.init.width if request.init else default_side)
    return width, request.height or (request.init.height if request.init else default_side)


def estimate(
    request: ImagesRequest, default_side: int, scale: int
) -> tuple[tuple[int, ...], float]:
    """Latent shape and slots times steps of a request that the engine has not seen yet; those of
    later passes count as many times as they are larger."""
    size = _size(request, default_side)
    steps = request.steps if request.init is None else max(1, int(request.steps * request.strength))
    skipped, slots = request.steps - steps, slots_of(request)
    interval = request.guidance_interval if slots > 1 else None
    calls = plan_calls(steps, skipped, interval, request.cache_interval)
    each = count_slots(calls, slots)
    for number, later in enumerate(request.passes, start=1):
        wide, high = final_size(request.passes[:number], *size, scale)
        made = max(1, int((later.steps or request.steps) * later.own_strength))
        each += made * slots * wide * high / (size[0] * size[1])
    return _shape(size, scale), each * len(request.seeds)


def slots_of(request: ImagesRequest) -> int:
    """Slots of each of its rows in a batch, at most."""
    own = [request.guidance_scale, *(each.guidance_scale for each in request.passes)]
    given = [scale for scale in own if scale is not None]
    return 1 if request.guidance_scale is not None and max(given) <= 1 else 2
