"""A row: one request in the batch, with everything that is its own.

Owns the request's texts, sampler, generator and latents. Knows nothing of the other rows.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from PIL.Image import Image

from rayjobs.diffusion.adapters.bank import LoraBank, LoraUse
from rayjobs.diffusion.control.bank import ControlBank, RowControl
from rayjobs.diffusion.economy.plan import Call, count_slots, plan_calls
from rayjobs.diffusion.facts import Usual
from rayjobs.diffusion.ip_adapter.bank import IpAdapterBank, RowIpAdapter
from rayjobs.diffusion.model import Model
from rayjobs.diffusion.request import Request, Result, check_side, check_strength
from rayjobs.diffusion.sampler import Sampler, Steps
from rayjobs.diffusion.sampler_names import check_schedule_taken
from rayjobs.diffusion.text.chunks import Tokens, padded, tokenize
from rayjobs.diffusion.text.encoder import Embedding, Text
from rayjobs.diffusion.text.schedule import stages
from rayjobs.diffusion.vae.inpainting import Inpainting
from rayjobs.diffusion.vae.latents import draw_noise, encode_image, fitted
from rayjobs.images.decode import open_image, open_mask

MAX_TEXTS = 64
"""Of a prompt whose words change from step to step."""


class LastStep(NamedTuple):
    """A step: what the UNet saw (1, C, H, W), the guided prediction for it, and the timestep."""

    input_1CHW: torch.Tensor
    noise_1CHW: torch.Tensor
    timestep: torch.Tensor


@dataclass(eq=False)
class Row:
    """`shape` is (C, H, W) of the latents. `said` are the texts of each slot, of two the negative
    ones first: one for all calls, or one for each.

    `calls` are those of the UNet, from first to last. `latents` are None until an init image is
    encoded; `embeddings` until the prompts are.
    """

    id: int
    request: Request
    sampler: Sampler
    generator: torch.Generator
    guidance_scale: float
    shape: tuple[int, int, int]
    said: list[tuple[Text, ...]]
    calls: tuple[Call, ...]
    loras: LoraUse
    size_ids: list[float]
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

    @property
    def is_ready(self) -> bool:
        return self.latents is not None

    @property
    def is_done(self) -> bool:
        return self.sampler.is_done

    @property
    def share_left(self) -> float:
        """Of its steps, 0..1."""
        return 1 - self.sampler.position / len(self.sampler.timesteps)

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
        """Of all calls that are left, as many as such of all blocks would cost."""
        return count_slots(self.calls[self.sampler.position :], len(self.said))

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
        return self._shown

    def encode_init(self, model: Model) -> None:
        """First latents from the init image, drawing from the generator as diffusers does."""
        assert self.init_1CHW is not None
        init_1CHW = encode_image(self.init_1CHW, self.generator, model)
        noise_1CHW = draw_noise(self.generator, self.shape, model)
        self.init_1CHW = None
        if self.inpainting is None:
            self.latents = self.sampler.noised(init_1CHW, noise_1CHW)
            return
        self.inpainting.known_1CHW, self.inpainting.noise_1CHW = init_1CHW, noise_1CHW
        if self.request.strength == 1:
            self.latents = self.sampler.start(noise_1CHW)
        else:
            self.latents = self.sampler.noised(init_1CHW, noise_1CHW)
        # diffusers encodes the masked image too, which UNets of four channels do not read.
        draw_noise(self.generator, self.shape, model)

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


def prepare_row(
    row_id: int,
    request: Request,
    model: Model,
    loras: LoraBank,
    controls: ControlBank,
    ip_adapters: IpAdapterBank,
) -> Row:
    """Check a request against the model and make its row; an init image is opened, not yet encoded.

    Raises ValueError or ImportError saying what is wrong with the request.
    """
    request.check()
    image = None if request.init_image is None else open_image(request.init_image)
    width, height = _size(request, image, model)
    use = loras.use_of((lora.path, lora.scale) for lora in request.loras)
    usual = loras.usual(use)
    guidance = request.guidance_scale
    guidance = usual.guidance_scale if guidance is None else guidance
    steps = _steps(request, usual, model)
    if image is not None:
        check_strength(request.strength, steps.num)
    generator = torch.Generator("cpu").manual_seed(request.seed)
    sampler = Sampler(
        request.sampler,
        request.sampler_options,
        loras.sampler_config(use),
        steps,
        None if image is None else request.strength,
        generator,
    )
    said = _said(request, guidance, use, model, len(sampler.timesteps))
    calls = _calls(request, sampler, len(said), model)
    row = Row(
        id=row_id,
        request=request,
        sampler=sampler,
        generator=generator,
        guidance_scale=guidance,
        shape=(model.unet.config.in_channels, height // model.vae_scale, width // model.vae_scale),
        said=said,
        calls=calls,
        loras=use,
        size_ids=[height, width, 0, 0, height, width],
        controls=controls.of_row(request.controls, (width, height), len(sampler.timesteps)),
        ip_adapters=ip_adapters.of_row(request.ip_adapters),
        warnings=tuple(
            filter(
                None,
                [
                    usual.warning(steps.num, guidance),
                    _unguided(request, calls),
                    *loras.warnings(use),
                ],
            )
        ),
    )
    if image is None:
        row.latents = sampler.start(draw_noise(generator, row.shape, model))
    else:
        row.init_1CHW = fitted(image, width, height, model)
        if request.mask is not None:
            mask = open_mask(request.mask)
            row.inpainting = Inpainting(mask, row.init_1CHW, request.keep_unmasked, model)
    return row


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
    return plan_calls(len(sampler.timesteps), sampler.num_skipped, interval, request.cache_interval)


def _unguided(request: Request, calls: tuple[Call, ...]) -> str | None:
    """A warning where no call is left with the guidance that is asked for."""
    if any(call.guided for call in calls) or request.guidance_interval is None:
        return None
    start, end = request.guidance_interval
    return (
        f"guidance_interval [{start:g}, {end:g}] holds none of the steps that are made, so they "
        "have no guidance"
    )


def _said(
    request: Request, guidance: float, use: LoraUse, model: Model, num_calls: int
) -> list[tuple[Text, ...]]:
    """The negative text, which guidance needs, and the prompt, in as many chunks; in the web UI's
    syntax perhaps of other words at each of the row's calls.

    clip_skip leaves the negative one alone, as in diffusers, but in the web UI's syntax.
    """
    layers = min(encoder.config.num_hidden_layers for encoder in model.text_encoders)
    if (request.clip_skip or 0) > layers - 1:
        raise ValueError(
            f"clip_skip is {request.clip_skip}; this model allows at most {layers - 1}"
        )
    syntax, skip = request.prompt_syntax, request.clip_skip
    asked = [(request.prompt, Text((), skip, use))]
    # A UNet distilled with guidance as an input (LCM) takes it there instead.
    if guidance > 1 and model.unet.config.time_cond_proj_dim is None:
        is_zero = request.negative_prompt is None and model.force_zeros
        negative = Text((), None if syntax == "plain" else skip, use, is_zero)
        asked.insert(0, (request.negative_prompt or "", negative))
    told = [
        _tokens(model, words, syntax, num_calls, negative=like is not asked[-1][1])
        for words, like in asked
    ]
    count = max(len(tokens.chunks) for tokens in itertools.chain.from_iterable(told))
    return [
        tuple(
            like._replace(chunks=padded(model, tokens.chunks, count), warnings=tokens.warnings)
            for tokens in of_slot
        )
        for (_, like), of_slot in zip(asked, told, strict=True)
    ]


def _tokens(
    model: Model, words: str, syntax: str, num_calls: int, *, negative: bool
) -> list[Tokens]:
    """A prompt as tokens: once, or for each call where its words change."""
    texts = [words] if syntax == "plain" else stages(words, num_calls)
    different = dict.fromkeys(texts)
    if len(different) > MAX_TEXTS:
        raise ValueError(f"a prompt says {len(different)} texts by turns; at most {MAX_TEXTS}")
    made = {text: tokenize(model, text, syntax, negative=negative) for text in different}
    return [made[text] for text in texts] if len(made) > 1 else [made[texts[0]]]
