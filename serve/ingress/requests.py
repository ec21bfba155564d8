"""From a request body to a request for the engine.

Owns the limits of this installation and the defaults of fields that callers leave out. Knows
nothing of HTTP. Whatever can be refused before any work is refused here.
"""

import secrets
from functools import partial
from typing import Any, NamedTuple

from rayjobs.diffusion.economy.plan import check_guidance_interval
from rayjobs.diffusion.request import (
    check_control,
    check_schedule,
    check_side,
    check_strength,
    num_scheduled,
)
from rayjobs.diffusion.sampler_names import check_name, check_schedule_taken, fitting
from rayjobs.diffusion.text.syntax import check_syntax
from rayjobs.images.edges import check_preprocess
from rayjobs.models.facts import ModelFacts
from serve import images
from serve.config import LimitsConfig, ServeConfig
from serve.errors import ApiError
from serve.ingress.schemas import EditBody, GenerateBody
from serve.protocol import ControlUse, ImagesRequest, IpAdapterUse, Pixels
from serve.registry import Entry, Registry


class Pictures(NamedTuple):
    """What a request follows and refers to."""

    controls: tuple[ControlUse, ...] = ()
    ip_adapters: tuple[IpAdapterUse, ...] = ()


NO_PICTURES = Pictures()
STRENGTH = 0.6
"""Defaults of num_inference_steps and strength."""


class ImagesRequestBuilder:
    """Builds requests within the limits of one installation. Every method may raise ApiError.

    Names are those that the registry knows: whoever calls has looked for new ones.
    """

    def __init__(self, config: ServeConfig, registry: Registry):
        self.config = config
        self.limits = config.limits
        self.registry = registry

    def entry(self, name: str | None) -> Entry:
        entry = self.registry.get(name)
        if entry is None or entry.weights is None:
            message = f"The model {name!r} does not exist; GET /v1/models lists those that do."
            raise ApiError(404, message, param="model", code="model_not_found")
        return entry

    def build_generation(
        self,
        body: GenerateBody,
        caller: str,
        request_id: str,
        pictures: Pictures = NO_PICTURES,
    ) -> ImagesRequest:
        entry = self.entry(body.model)
        size = body.width_height
        if size is None and entry.facts.side is not None:
            size = (entry.facts.side, entry.facts.side)
        more = {"caller": caller, "id": request_id, **pictures._asdict()}
        return self._build(body, entry, size, **more)

    def build_edit(
        self,
        body: EditBody,
        image: Pixels,
        mask: Pixels | None,
        caller: str,
        request_id: str,
        pictures: Pictures = NO_PICTURES,
    ) -> ImagesRequest:
        entry = self.entry(body.model)
        size = body.width_height or self._size_like(image, entry.facts)
        strength = body.strength
        if strength is None:
            strength = STRENGTH if mask is None else 1.0
        steps = self._steps(body, entry.facts)
        self._check_field("strength", lambda: check_strength(strength, steps))
        return self._build(
            body,
            entry,
            size,
            caller=caller,
            id=request_id,
            init=images.fitted(image, *size),
            mask=None if mask is None else images.fitted(mask, *size),
            strength=strength,
            **pictures._asdict(),
        )

    def check(self, body: GenerateBody) -> None:
        """Refuse what can be refused before images are decoded."""
        entry, limits = self.entry(body.model), self.limits
        if body.background == "transparent":
            raise ApiError(400, "Transparent backgrounds are not supported.", param="background")
        if body.response_format == "url" and self.config.results.uri is None:
            message = "Links are not configured on this server; use response_format b64_json."
            raise ApiError(400, message, param="response_format")
        if body.partial_images and not body.stream:
            raise ApiError(400, "partial_images needs stream=true.", param="partial_images")
        _check_max("n", body.n or 1, limits.max_n)
        _check_max("num_inference_steps", self._steps(body, entry.facts), limits.max_steps)
        _check_max("guidance_scale", body.guidance_scale or 0, limits.max_guidance_scale)
        for name in ("prompt", "negative_prompt"):
            length = len(getattr(body, name) or "")
            if length > limits.max_prompt_chars:
                message = f"{name} has {length} characters; at most {limits.max_prompt_chars}."
                raise ApiError(400, message, param=name)
            self._check_field(name, partial(_check_syntax, body, name))
        self._check_size(body.width_height, entry.facts)
        if body.sampler is not None:
            self._check_sampler(body.sampler, entry.facts)
        self._check_economy(body, entry.facts)
        self._check_loras(body, entry)
        self._check_controls(body, entry)
        self._check_ip_adapters(body, entry)

    def _build(
        self, body: GenerateBody, entry: Entry, size: tuple[int, int] | None, **more: Any
    ) -> ImagesRequest:
        first = secrets.randbits(32) if body.seed is None else body.seed
        seeds = tuple((first + number) % 2**63 for number in range(body.n or 1))
        width, height = size or (None, None)
        deadline_s = min(body.deadline_s or float("inf"), self.limits.max_deadline_s)
        return ImagesRequest(
            model=entry.name,
            prompt=body.prompt,
            negative_prompt=body.negative_prompt,
            prompt_syntax=body.prompt_syntax or "plain",
            seeds=seeds,
            steps=self._steps(body, entry.facts),
            sampler=body.sampler,
            guidance_scale=body.guidance_scale,
            guidance_rescale=body.guidance_rescale or 0.0,
            guidance_interval=_tuple(body.guidance_interval),
            cache_interval=body.cache_interval or 1,
            timesteps=_tuple(body.timesteps),
            sigmas=_tuple(body.sigmas),
            clip_skip=body.clip_skip,
            width=width,
            height=height,
            loras=tuple((use.name, use.scale) for use in body.loras or ()),
            partial_images=body.partial_images or 0,
            progress=bool(body.progress and body.stream),
            deadline_s=deadline_s,
            **more,
        )

    def _steps(self, body: GenerateBody, facts: ModelFacts) -> int:
        own = num_scheduled(body.timesteps, body.sigmas)
        return own or body.num_inference_steps or min(facts.steps, self.limits.max_steps)

    def _check_size(self, size: tuple[int, int] | None, facts: ModelFacts) -> None:
        if size is None:
            return
        for name, pixels in zip(("width", "height"), size, strict=True):
            self._check_field("size", lambda name=name, pixels=pixels: check_side(name, pixels))
            _check_max("size", pixels, self.limits.max_side)
        if size[0] * size[1] > self.limits.max_pixels:
            message = f"{size[0]}x{size[1]} are {size[0] * size[1]} pixels; "
            raise ApiError(400, f"{message}at most {self.limits.max_pixels}.", param="size")

    def _check_sampler(self, name: str, facts: ModelFacts) -> None:
        if facts.family is None:
            return  # its files are not readable here: the replica will check
        self._check_field("sampler", lambda: check_name(name, facts.prediction))

    def _check_economy(self, body: GenerateBody, facts: ModelFacts) -> None:
        """Guidance for a part of the schedule, and a schedule of the caller's own."""
        interval = body.guidance_interval
        self._check_field("guidance_interval", lambda: check_guidance_interval(interval))
        name = "timesteps" if body.sigmas is None else "sigmas"
        steps = body.num_inference_steps
        self._check_field(name, lambda: check_schedule(body.timesteps, body.sigmas, steps))
        if body.sampler is None or facts.family is None or getattr(body, name) is None:
            return  # the replica will check
        taken = partial(check_schedule_taken, body.sampler, name, facts.prediction)
        self._check_field("sampler", taken)

    def _check_loras(self, body: GenerateBody, entry: Entry) -> None:
        uses = body.loras or []
        _check_max("loras", len(uses), self.limits.max_loras)
        for use in uses:
            lora = self.registry.get(use.name)
            if lora is None or lora.lora is None:
                message = f"The LoRA {use.name!r} does not exist; GET /v1/models lists them."
                raise ApiError(404, message, param="loras", code="model_not_found")
            uris = {each.weights.uri for each in (lora, entry) if each.weights is not None}
            if len(uris) > 1:
                raise ApiError(
                    400, f"The LoRA {use.name!r} is for another model, {lora.base}.", param="loras"
                )
            _check_max("loras", abs(use.scale), self.limits.max_lora_scale)

    def _check_controls(self, body: GenerateBody, entry: Entry) -> None:
        uses = body.controls or []
        _check_max("controls", len(uses), self.limits.max_controls)
        if uses and (body.cache_interval or 1) > 1:
            message = "controls and cache_interval do not go together; leave one of them out."
            raise ApiError(400, message, param="cache_interval")
        for use in uses:
            self._check_net("controls", f"ControlNet {use.name!r}", use.name, entry)
            _check_max("controls", abs(use.scale), self.limits.max_control_scale)
            check = partial(check_control, use.scale, use.start, use.end)
            self._check_field("controls", check)
            self._check_field("controls", partial(check_preprocess, use.preprocess))

    def _check_ip_adapters(self, body: GenerateBody, entry: Entry) -> None:
        uses = body.ip_adapters or []
        _check_max("ip_adapters", len(uses), self.limits.max_ip_adapters)
        for use in uses:
            self._check_net("ip_adapters", f"IP-Adapter {use.name!r}", use.name, entry)
            _check_max("ip_adapters", abs(use.scale), self.limits.max_ip_adapter_scale)

    def _check_net(self, param: str, what: str, name: str, entry: Entry) -> None:
        """Raise ApiError unless there is such a ControlNet or IP-Adapter, for this model."""
        net = self.registry.get(name)
        if net is None or net.kind != param.removesuffix("s"):
            message = f"The {what} does not exist; GET /v1/models lists them."
            raise ApiError(404, message, param=param, code="model_not_found")
        if net.base not in (None, entry.name, entry.base):
            raise ApiError(400, f"The {what} is for another model, {net.base}.", param=param)

    def _size_like(self, image: Pixels, facts: ModelFacts) -> tuple[int, int]:
        """The image's aspect ratio, at about as many pixels as the model was trained on."""
        side = facts.side or 512
        multiple = max(facts.multiple, side // 16 // facts.multiple * facts.multiple)
        scale = side / (image.width * image.height) ** 0.5
        max_side = self.limits.max_side // multiple * multiple
        width, height = (
            min(max_side, max(multiple, round(pixels * scale / multiple) * multiple))
            for pixels in (image.width, image.height)
        )
        return width, height

    def _check_field(self, param: str, check: Any) -> None:
        try:
            check()
        except ValueError as error:
            raise ApiError(400, f"{error}.", param=param, code="invalid_value") from None


def _check_syntax(body: GenerateBody, name: str) -> None:
    text, syntax = getattr(body, name) or "", body.prompt_syntax or "plain"
    check_syntax(name, text, syntax, negative=name == "negative_prompt")


def samplers(facts: ModelFacts) -> list[str]:
    """Names of the samplers that a model can use."""
    return fitting(facts.prediction)


def describe(entry: Entry, limits: LimitsConfig, loaded: bool) -> dict[str, Any]:
    """A model in `/v1/models`: OpenAI's fields, its defaults and its limits."""
    side, multiple = entry.facts.side, entry.facts.multiple
    ratios = ((1, 1), (4, 3), (3, 4), (3, 2), (2, 3), (16, 9), (9, 16))
    return {
        "id": entry.name,
        "object": "model",
        "created": entry.created,
        "owned_by": "rayjobs",
        "kind": entry.kind,
        "base": entry.base,
        "family": entry.facts.family,
        "default_size": None if side is None else f"{side}x{side}",
        "sizes": [] if side is None else _sizes(side, multiple, ratios, limits),
        "limits": {
            "max_pixels": limits.max_pixels,
            "min_side": multiple,
            "max_side": limits.max_side,
            "size_multiple": multiple,
            "max_steps": limits.max_steps,
            "max_n": limits.max_n,
        },
        "defaults": {
            "num_inference_steps": entry.facts.steps,
            "guidance_scale": entry.facts.guidance_scale,
            "strength": STRENGTH,
        },
        "samplers": samplers(entry.facts),
        "loaded": loaded,
        "prompt_hint": next(iter(entry.hints), None),
        "prompt_hints": list(entry.hints),
    }


def _sizes(
    side: int, multiple: int, ratios: tuple[tuple[int, int], ...], limits: LimitsConfig
) -> list[str]:
    """About side x side pixels in each aspect ratio, in multiples that models were trained on."""
    step = max(multiple, side // 16 // multiple * multiple)
    sizes = []
    for wide, high in ratios:
        scale = side / (wide * high) ** 0.5
        width, height = (round(part * scale / step) * step for part in (wide, high))
        if max(width, height) <= limits.max_side and width * height <= limits.max_pixels:
            sizes.append(f"{width}x{height}")
    return sizes


def _tuple(values: list[Any] | None) -> Any:
    return None if values is None else tuple(values)


def _check_max(param: str, value: float, limit: float) -> None:
    if value > limit:
        raise ApiError(400, f"{param} is {value:g}; at most {limit:g} here.", param=param)
