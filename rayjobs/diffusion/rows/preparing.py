"""From a request to its row, and to the rows of its passes.

Owns every check of a request that needs the model. Knows nothing of batches.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from PIL.Image import Image

from rayjobs.diffusion.adapters.bank import LoraBank
from rayjobs.diffusion.control.bank import ControlBank
from rayjobs.diffusion.economy.plan import Call, plan_calls
from rayjobs.diffusion.facts import LATENTS, Usual
from rayjobs.diffusion.ip_adapter.bank import IpAdapterBank
from rayjobs.diffusion.model import Model
from rayjobs.diffusion.passes import Pass
from rayjobs.diffusion.refiner.bank import Refiners, check_same_latents, check_same_schedule
from rayjobs.diffusion.request import (
    SIZE_MULTIPLE,
    Request,
    check_side,
    check_strength,
)
from rayjobs.diffusion.rows.row import Row
from rayjobs.diffusion.sampler import Sampler, Span, Steps
from rayjobs.diffusion.sampler_names import check_schedule_taken
from rayjobs.diffusion.text.said import said_by
from rayjobs.diffusion.vae.latents import draw_noise, fitted
from rayjobs.images.decode import open_image

AESTHETIC_SCORES = 2.5, 6.0
"""Of the negative text and of the prompt, as diffusers tells them a refiner."""
NO_MASK = (
    "the model only makes masked parts of a picture anew, and the request has no mask; give "
    "init_image and mask (all white for the whole picture), or take another model"
)


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
        first.set_mask()
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
