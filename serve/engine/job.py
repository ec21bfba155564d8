"""One ask while it is worked on: its rows, what is left of them, and what is owed to its caller.

Owns the way from an ask to the engine's requests and from results to events. Knows nothing of
threads or of other asks.
"""

import asyncio
import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from PIL import Image

from rayjobs.diffusion.request import Lora, Request
from serve.engine.models import Loaded
from serve.images import to_image, to_pixels
from serve.protocol import Ask, Event, Failed, Finished

LATENT_CHANNELS = 4


@dataclass(eq=False)
class Job:
    """Lives in the engine's thread once submitted; only `events` is read on the event loop."""

    ask: Ask
    loaded: Loaded
    events: asyncio.Queue[Event]
    loras: tuple[Lora, ...] = ()
    arrived_s: float = field(default_factory=time.monotonic)
    shape: tuple[int, ...] = (0, 0, 0)
    images: dict[int, int] = field(default_factory=dict)
    """The image of each row that is not finished."""
    left: dict[int, int] = field(default_factory=dict)
    """Place-steps left, by row."""
    owed: dict[int, list[int]] = field(default_factory=dict)
    """Steps after which a preview of each row is owed, the next one first."""
    places: int = 1
    """Of each row, in a call."""
    num_partials: int = 0
    """Previews of each image: as many as were asked for, or as there are steps for."""
    started: bool = False
    told_s: float = float("-inf")
    """When its caller last heard that it waits."""
    over: bool = False

    @property
    def deadline_s(self) -> float:
        seconds = self.ask.deadline_s
        return float("inf") if seconds is None else self.arrived_s + seconds

    @property
    def place_steps(self) -> int:
        return sum(self.left.values())

    def requests(self) -> list[Request]:
        """What the engine is asked for, an image each."""
        ask = self.ask
        return [
            Request(
                prompt=ask.prompt,
                negative_prompt=ask.negative_prompt,
                seed=seed,
                steps=ask.steps,
                sampler=ask.sampler,
                guidance_scale=ask.guidance_scale,
                guidance_rescale=ask.guidance_rescale,
                clip_skip=ask.clip_skip,
                width=ask.width,
                height=ask.height,
                init_image=None if ask.init is None else to_image(ask.init),
                strength=ask.strength,
                mask=None if ask.mask is None else to_image(ask.mask),
                keep_unmasked=ask.mask is not None,
                loras=self.loras,
            )
            for seed in ask.seeds
        ]

    def enter(self, row_id: int, image: int, row: Any) -> None:
        """Take note of a row that the engine has."""
        total = len(row.sampler.timesteps)
        self.images[row_id] = image
        self.shape = row.shape
        self.places = row.num_slots
        self.left[row_id] = total * row.num_slots
        # No preview after the last step: the picture itself comes then.
        self.num_partials = count = min(self.ask.partial_images, max(0, total - 1))
        self.owed[row_id] = [round(total * (n + 1) / (count + 1)) for n in range(count)]

    def finish(self, row_id: int, image: Image.Image, warnings: tuple[str, ...]) -> Finished:
        number = self.images[row_id]
        self.leave(row_id)
        self.over = not self.images
        seed, pixels = self.ask.seeds[number], to_pixels(image)
        return Finished(number, seed, pixels, warnings, self._text_tokens)

    @cached_property
    def _text_tokens(self) -> int:
        tokenizer = self.loaded.engine.model.tokenizers[0]
        said = [self.ask.prompt, self.ask.negative_prompt or ""]
        return sum(len(tokenizer(text, add_special_tokens=False).input_ids) for text in said)

    def leave(self, row_id: int) -> None:
        for known in (self.images, self.left, self.owed):
            known.pop(row_id, None)

    def fail(self, failed: Failed) -> Failed:
        self.over = True
        return failed


def estimate(ask: Ask, default_side: int, scale: int) -> tuple[tuple[int, ...], int]:
    """Latent shape and place-steps of an ask before the engine has seen it."""
    width = ask.width or (ask.init.width if ask.init else default_side)
    height = ask.height or (ask.init.height if ask.init else default_side)
    steps = ask.steps if ask.init is None else max(1, int(ask.steps * ask.strength))
    places = 1 if ask.guidance_scale is not None and ask.guidance_scale <= 1 else 2
    shape = (LATENT_CHANNELS, height // scale, width // scale)
    return shape, steps * places * len(ask.seeds)
