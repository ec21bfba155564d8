"""A row: one request in the batch, with everything that is its own.

Owns the request's texts, sampler, generator and latents. Knows nothing of the other rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from rayjobs.diffusion.adapters.bank import LoraUse
from rayjobs.diffusion.control.bank import RowControl
from rayjobs.diffusion.economy.plan import Call, count_slots
from rayjobs.diffusion.ip_adapter.bank import RowIpAdapter
from rayjobs.diffusion.model import Model
from rayjobs.diffusion.passes import Way
from rayjobs.diffusion.request import (
    Request,
    Result,
)
from rayjobs.diffusion.sampler import Sampler
from rayjobs.diffusion.text.encoder import Embedding, Text
from rayjobs.diffusion.vae.following import resized_latents, resized_picture
from rayjobs.diffusion.vae.inpainting import Inpainting
from rayjobs.diffusion.vae.latents import draw_noise, encode_image
from rayjobs.diffusion.vae.worker import decode_row
from rayjobs.images.decode import open_mask


class LastStep(NamedTuple):
    """A step: what the UNet saw (1, C, H, W), the guided prediction for it, and the timestep."""

    input_1CHW: torch.Tensor
    noise_1CHW: torch.Tensor
    timestep: torch.Tensor


@dataclass(eq=False)
class Row:
    """`shape` is (C, H, W) of the latents. `said` are the texts of each slot, of two the negative
    ones first: one for all calls, or one for each.

    `request` is what was asked for, `settings` what it says of this pass, which is its `number`-th;
    `then` is the row of the next one, which has the same id and goes on with the same generator.

    `calls` are those of the UNet, from first to last. `latents` are None until an init image is
    encoded; `embeddings` until the prompts are.
    """

    id: int
    request: Request
    settings: Request
    model: Model
    sampler: Sampler
    generator: torch.Generator
    guidance_scale: float
    shape: tuple[int, int, int]
    said: list[tuple[Text, ...]]
    calls: tuple[Call, ...]
    loras: LoraUse
    size_ids: list[list[float]]
    """What SDXL's UNet is told beside each slot's text."""
    controls: tuple[RowControl, ...] = ()
    ip_adapters: tuple[RowIpAdapter, ...] = ()
    init_1CHW: torch.Tensor | None = None
    inpainting: Inpainting | None = None
    latents: torch.Tensor | None = None
    embeddings: dict[Text, Embedding] | None = field(default=None)
    deep: dict[int, torch.Tensor] = field(default_factory=dict)
    """What the UNet's deep blocks gave for each slot, where later calls take it."""
    last_step: LastStep | None = None
    """The last step, for a preview."""
    warnings: tuple[str, ...] = ()
    """What of the request is not done as asked, apart from its texts."""
    number: int = 0
    way: Way = "pixel"
    refiner: str | None = None
    """The path of the model whose row it is; None of the engine's own."""
    before: "Row | None" = None
    """The row of the pass before, until its picture is taken over."""
    then: "Row | None" = None
    steps_before: int = 0
    """UNet calls of the passes before."""

    @property
    def is_ready(self) -> bool:
        return self.latents is not None

    @property
    def is_done(self) -> bool:
        return self.sampler.is_done

    @property
    def progress(self) -> tuple[int, int]:
        """UNet calls made for the request, and those that it takes in all its passes."""
        left = sum(len(row.sampler.timesteps) for row in self.rows)
        return self.steps_before + self.sampler.position, self.steps_before + left

    @property
    def rows(self) -> "list[Row]":
        """Itself and those of the passes after it."""
        return [self] if self.then is None else [self, *self.then.rows]

    @property
    def share_left(self) -> float:
        """Of its steps, 0..1."""
        made, total = self.progress
        return 1 - made / total

    @property
    def call(self) -> Call:
        """The next one."""
        return self.calls[min(self.sampler.position, len(self.calls) - 1)]

    @property
    def slots(self) -> Sequence[int]:
        """Which of its texts the next call is for: where guidance pauses, the prompt alone."""
        texts = range(len(self.said))
        return texts if self.call.guided else texts[-1:]

    @property
    def num_slots(self) -> int:
        """Of the next UNet call: two with guidance, one without."""
        return len(self.slots)

    @property
    def share(self) -> float:
        """Of the slots that it takes at most, those of the next call."""
        return self.num_slots / len(self.said)

    @property
    def reuses(self) -> bool:
        """Whether its next call is one of the outermost blocks alone."""
        return self.call.reuses

    @property
    def slots_left(self) -> float:
        """Of all calls that are left, as many as such of all blocks would cost; those of later
        passes count as many times as their latents are larger."""
        own = count_slots(self.calls[self.sampler.position :], len(self.said))
        return own if self.then is None else own + self.then.slots_left * self.then.area / self.area

    @property
    def area(self) -> int:
        """Of its latents."""
        return self.shape[1] * self.shape[2]

    @property
    def texts(self) -> list[Text]:
        """All its texts, each once."""
        return list(dict.fromkeys(text for of_slot in self.said for text in of_slot))

    @property
    def num_chunks(self) -> int:
        """Of 77 tokens, in each of its texts."""
        return len(self.said[0][0].chunks)

    @property
    def stage(self) -> int:
        """Another number where another of its texts may be said."""
        return 0 if all(len(of_slot) == 1 for of_slot in self.said) else self.sampler.position

    def embedding(self, slot: int) -> Embedding:
        """Of what a slot says at this call."""
        assert self.embeddings is not None
        of_slot = self.said[slot]
        return self.embeddings[of_slot[self.sampler.position % len(of_slot)]]

    def scaled_latents(self) -> torch.Tensor:
        """What the UNet sees of this row at this step."""
        assert self.latents is not None
        self._shown = self.sampler.scale_input(self.latents)
        return self._shown if self.inpainting is None else self.inpainting.input(self._shown)

    def encode_init(self) -> None:
        """First latents from the init image, or from what the pass before made, drawing from the
        generator as diffusers does."""
        if self.before is not None:
            before, self.before = self.before, None
            self._take_over(before)
        if self.is_ready:
            return
        model = self.model
        assert self.init_1CHW is not None
        init_1CHW, self.init_1CHW = self.init_1CHW, None
        if self.inpainting is not None:
            how = self.settings.strength, self.sampler, self.generator
            self.latents = self.inpainting.begin(init_1CHW, *how, model)
            return
        init_1CHW = encode_image(init_1CHW, self.generator, model)
        noise_1CHW = draw_noise(self.generator, self.shape, model)
        self.latents = self.sampler.noised(init_1CHW, noise_1CHW)

    def _take_over(self, before: "Row") -> None:
        assert before.latents is not None
        model = self.model
        if self.way == "as is":
            self.latents = resized_latents(before.latents, self.shape)
            return
        if self.way == "latent":
            init_1CHW = resized_latents(before.latents, self.shape)
            self.latents = self.sampler.noised(
                init_1CHW, draw_noise(self.generator, self.shape, model)
            )
            return
        image = decode_row(before)[1]
        height, width = (side * model.vae_scale for side in self.shape[1:])
        self.init_1CHW = resized_picture(image, width, height, model)
        self.set_mask()

    def set_mask(self) -> None:
        if self.request.mask is not None:
            assert self.init_1CHW is not None
            mask = open_mask(self.request.mask)
            self.inpainting = Inpainting(
                mask, self.init_1CHW, self.request.keep_unmasked, self.model
            )

    def follow(self) -> "Row":
        """The row of the next pass, which begins with what this one has made."""
        assert self.then is not None
        self.then.before, self.then.steps_before = self, self.progress[0]
        self.then.last_step = self.last_step
        self.then.warnings = (*self.warnings, *self.then.warnings)
        return self.then

    def advance(self, noise_1CHW: torch.Tensor) -> None:
        """One step of this row's own sampler."""
        assert self.latents is not None
        self.last_step = LastStep(self._shown, noise_1CHW, self.sampler.timestep)
        self.latents = self.sampler.advance(noise_1CHW, self.latents)
        if self.is_done or not self.reuses:
            self.deep = {}
        if self.inpainting is not None:
            self.latents = self.inpainting.blend(self.latents, self.sampler)

    def result(self, **outcome: Any) -> Result:
        said = self.texts if self.embeddings else []
        of_texts = (warning for text in said for warning in text.warnings)
        warnings = dict.fromkeys([*self.warnings, *of_texts])
        return Result(id=self.id, request=self.request, warnings=tuple(warnings), **outcome)
