"""A row: one request in the batch, with everything that is its own.

Owns the request's texts, sampler, generator and latents. Knows nothing of the other rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from PIL.Image import Image

from rayjobs.diffusion.adapters.bank import LoraBank, LoraUse
from rayjobs.diffusion.control.bank import ControlBank, RowControl
from rayjobs.diffusion.economy.plan import Call, count_slots, plan_calls
from rayjobs.diffusion.facts import LATENTS, Usual
from rayjobs.diffusion.ip_adapter.bank import IpAdapterBank, RowIpAdapter
from rayjobs.diffusion.model import Model
from rayjobs.diffusion.passes import Pass, Way
from rayjobs.diffusion.refiner.bank import Refiners, check_same_latents, check_same_schedule
from rayjobs.diffusion.request import (
    SIZE_MULTIPLE,
    Request,
    Result,
    check_side,
    check_strength,
)
from rayjobs.diffusion.sampler import Sampler, Span, Steps
from rayjobs.diffusion.sampler_names import check_schedule_taken
from rayjobs.diffusion.text.encoder import Embedding, Text
from rayjobs.diffusion.text.said import said_by
from rayjobs.diffusion.vae.following import resized_latents, resized_picture
from rayjobs.diffusion.vae.inpainting import Inpainting
from rayjobs.diffusion.vae.latents import draw_noise, encode_image, fitted
from rayjobs.diffusion.vae.worker import decode_row
from rayjobs.images.decode import open_image, open_mask

AESTHETIC_SCORES = 2.5, 6.0
"""Of the negative text and of the prompt, as diffusers tells them a refiner."""
NO_MASK = (
    "the model only makes masked parts of a picture anew, and the request has no mask; give "
    "init_image and mask (all white for the whole picture), or take another model"
)


class LastStep(NamedTuple):
    """A step: what the UNet saw (1, C, H, W), the guided prediction for it, and the timestep."""

    input_1CHW: torch.Tensor
    noise_1CHW: torch.Tensor
    timestep: torch.Tensor


class Parts(NamedTuple):
    """What a row is made for, and what it may use."""

    model: Model
    loras: LoraBank
    controls: ControlBank
    ip_adapters: IpAdapterBank
    refiners: Refiners | None = None
    """Models that its passes may name."""

    def of_pass(self, each: Pass) -> "Parts":
        """Those of the pass's own model, where it names one."""
        if each.model is None:
            return self
        if self.refiners is None:
            raise ValueError("a pass of another model is not made here; leave its model out")
        other = self.refiners.load(each.model)
        return Parts(other.model, other.loras, other.controls, other.ip_adapters, self.refiners)


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
        self._mask()

    def _mask(self) -> None:
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


def prepare_row(row_id: int, request: Request, parts: Parts) -> Row:
    """Check a request against the model and make its row, and those of its passes; an init image is
    opened, not yet encoded.

    Raises ValueError or ImportError saying what is wrong with the request.
    """
    request.check()
    model = parts.model
    if model.needs_mask and request.mask is None:
        raise ValueError(NO_MASK)
    image = None if request.init_image is None else open_image(request.init_image)
    width, height = _size(request, image, model)
    generator = torch.Generator("cpu").manual_seed(request.seed)
    span = _span(request, 0, None if image is None else request.strength)
    own = _of_pass(request, (width, height), span, generator, parts)
    first = Row(id=row_id, request=request, **own)
    if image is None:
        first.latents = first.sampler.start(draw_noise(generator, first.shape, model))
    else:
        first.init_1CHW = fitted(image, width, height, model)
        first._mask()
    row, size = first, (width, height)
    for each in request.passes:
        row.then, size = _following(row, each, size, parts)
        row = row.then
    return first


def _following(
    before: Row, each: Pass, size: tuple[int, int], parts: Parts
) -> tuple[Row, tuple[int, int]]:
    """The row of the pass after a row, and its picture's size."""
    of_first, parts, request = parts.model, parts.of_pass(each), before.request
    width, height = each.size(*size, max(SIZE_MULTIPLE, of_first.vae_scale, parts.model.vae_scale))
    settings = each.settings(request, width, height)
    if each.way == "as is":
        settings = _going_on(settings, before, each)
    number = before.number + 1
    span = _span(request, number, settings.strength)
    own = _of_pass(settings, (width, height), span, before.generator, parts)
    row = Row(id=before.id, request=request, number=number, way=each.way, refiner=each.model, **own)
    if each.way != "pixel":
        check_same_latents(before.model.vae.config, row.model.vae.config)
    if each.way == "as is":
        check_same_schedule(before.sampler.scheduler.config, row.sampler.scheduler.config)
    return row, (width, height)


def _going_on(settings: Request, before: Row, each: Pass) -> Request:
    """A pass's settings with the sampler of the one before, and its steps but for own ones."""
    names = ["sampler", "sampler_options"]
    names += [] if each.steps else ["steps", "timesteps", "sigmas"]
    kept = {name: getattr(before.settings, name) for name in names}
    kept["sampler"] = kept["sampler"] or type(before.sampler.scheduler).__name__
    return replace(settings, **kept)


def _span(request: Request, number: int, strength: float | None) -> Span:
    """What a pass goes through of its schedule, up to where the next one goes on."""
    starts = [None, *(each.denoising_start for each in request.passes), None]
    start, end = starts[number], starts[number + 1]
    return Span(strength if start is None else None, start, end)


def _of_pass(
    settings: Request,
    size: tuple[int, int],
    span: Span,
    generator: torch.Generator,
    parts: Parts,
) -> dict[str, Any]:
    """What a row has of its own in one pass of a request."""
    model, loras = parts.model, parts.loras
    use = loras.use_of((lora.path, lora.scale) for lora in settings.loras)
    usual = loras.usual(use)
    guidance = settings.guidance_scale
    guidance = usual.guidance_scale if guidance is None else guidance
    steps = _steps(settings, usual, model)
    if span.strength is not None:
        check_strength(settings.strength, steps.num)
    sampler = Sampler(
        settings.sampler,
        settings.sampler_options,
        loras.sampler_config(use),
        steps,
        span,
        generator,
    )
    said = said_by(settings, guidance, use, model, len(sampler.timesteps))
    calls = _calls(settings, sampler, len(said), model)
    warnings = [
        usual.warning(steps.num, guidance),
        _unguided(settings, calls),
        *loras.warnings(use),
    ]
    width, height = size
    return {
        "settings": settings,
        "model": model,
        "sampler": sampler,
        "generator": generator,
        "guidance_scale": guidance,
        "shape": (LATENTS, height // model.vae_scale, width // model.vae_scale),
        "said": said,
        "calls": calls,
        "loras": use,
        "size_ids": _size_ids(width, height, len(said), model),
        "controls": parts.controls.of_row(settings.controls, size, len(sampler.timesteps)),
        "ip_adapters": parts.ip_adapters.of_row(settings.ip_adapters),
        "warnings": tuple(filter(None, warnings)),
    }


def _size_ids(width: int, height: int, num_texts: int, model: Model) -> list[list[float]]:
    """Of each text, the negative one first; a refiner is told how good a picture is to be."""
    size: list[float] = [height, width, 0, 0]
    if model.is_refiner:
        return [[*size, score] for score in AESTHETIC_SCORES[-num_texts:]]
    return [[*size, height, width]] * num_texts


def _size(request: Request, image: Image | None, model: Model) -> tuple[int, int]:
    """Width and height: as asked, else the init image's rounded down to whole latents."""
    whole = [model.default_side] * 2
    if image is not None:
        whole = [side - side % model.vae_scale for side in image.size]
    width, height = request.width or whole[0], request.height or whole[1]
    if not (width and height):
        raise ValueError(f"init image is too small: {image.size if image else None}")
    if request.width or request.height:
        check_side("width", width)
        check_side("height", height)
    return width, height


def _steps(request: Request, usual: Usual, model: Model) -> Steps:
    """As asked, else those that the model is made for. Raises ValueError where these do not go."""
    num = usual.steps if request.own_steps is None else request.own_steps
    timesteps, own = request.timesteps, usual.timesteps
    if request.sigmas is None and timesteps is None and own is not None and len(own) == num:
        timesteps = own
        if request.sampler is not None:
            check_schedule_taken(request.sampler, "timesteps", model.prediction, own)
    return Steps(num, timesteps, request.sigmas)


def _calls(request: Request, sampler: Sampler, num_texts: int, model: Model) -> tuple[Call, ...]:
    """A row's UNet calls. Raises ValueError where the model cannot make them."""
    if request.cache_interval > 1 and model.options.compile == "full":
        raise ValueError(
            f"cache_interval is {request.cache_interval}, but the UNet is compiled as a whole; "
            "leave cache_interval out or set compile to blocks"
        )
    if request.cache_interval > 1 and request.controls:
        raise ValueError(
            f"cache_interval is {request.cache_interval}, but the request has controls, which act "
            "on the blocks that it leaves out; leave one of them out"
        )
    interval = request.guidance_interval if num_texts > 1 else None
    num, every = len(sampler.timesteps), request.cache_interval
    return plan_calls(num, sampler.num_skipped, interval, every, sampler.num_left)


def _unguided(request: Request, calls: tuple[Call, ...]) -> str | None:
    """A warning where no call is left with the guidance that is asked for."""
    if any(call.guided for call in calls) or request.guidance_interval is None:
        return None
    start, end = request.guidance_interval
    return (
        f"guidance_interval [{start:g}, {end:g}] holds none of the steps that are made, so they "
        "have no guidance"
    )
