"""The arithmetic of a step: one diffusers scheduler object per row.

Owns the samplers' names, which of them fit which model, and a row's walk over its timesteps. Knows
nothing of batches or of the UNet.
"""

import inspect
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import diffusers
import torch

from rayjobs.diffusion.files.header import first_line
from rayjobs.diffusion.modules.upload import Uploading, upload
from rayjobs.diffusion.sampler_names import (
    EPSILON,
    LIBRARY,
    SAMPLERS,
    Prediction,
    check_name,
    check_schedule_taken,
)

__all__ = ["SAMPLERS", "Sampler", "resolve"]


def resolve(
    name: str, options: Mapping[str, Any], prediction: Prediction = EPSILON
) -> tuple[Any, dict[str, Any]]:
    """The diffusers class and config options that `name` and `options` mean.

    Raises:
        ValueError: the name or an option is unknown, or the sampler is not for such a model.
        ImportError: the library that this sampler needs is not installed.
    """
    class_name, preset = check_name(name, prediction)
    _require_library(name, class_name)
    sampler_class = getattr(diffusers, class_name)
    known = _parameters(sampler_class.__init__) - {"self"} | {"eta"}
    for option in options:
        if option not in known:
            raise ValueError(
                f"sampler {name!r} has no option {option!r}; it has {', '.join(sorted(known))}"
            )
    return sampler_class, {**preset, **options}


def check_begins_anywhere(name: str, sampler_class: Any) -> None:
    """Raise ValueError for a sampler that cannot begin from a picture."""
    if not hasattr(sampler_class, "add_noise"):
        raise ValueError(f"sampler {name!r} cannot do image-to-image; take another")


@lru_cache
def _parameters(function: Any) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _require_library(name: str, class_name: str) -> None:
    library = LIBRARY.get(class_name)
    if library is None:
        return
    try:
        __import__(library)
    except ImportError:
        raise ImportError(
            f"sampler {name!r} needs {library}: pip install 'rayjobs[samplers]'"
        ) from None


class Steps(NamedTuple):
    """How many there are, perhaps with the timesteps or sigmas that they are to go through."""

    num: int
    timesteps: Sequence[int] | None = None
    sigmas: Sequence[float] | None = None

    @property
    def given(self) -> dict[str, list[Any]]:
        """A schedule of the request's own, by its name."""
        both = {"timesteps": self.timesteps, "sigmas": self.sigmas}
        return {name: list(values) for name, values in both.items() if values is not None}


class Span(NamedTuple):
    """Which part of its schedule a row goes through.

    From a picture the last part, as long as `strength` says; or what is between the shares `start`
    and `end` of all noise levels, as by `denoising_start` and `denoising_end` of diffusers'
    pipelines.
    """

    strength: float | None = None
    start: float | None = None
    end: float | None = None

    def first(self, scheduler: Any, num: int) -> int:
        """The first call of a schedule of `num` steps."""
        if self.start is None:
            strength = 1.0 if self.strength is None else self.strength
            return max(num - min(int(num * strength), num), 0) * int(scheduler.order)
        left = int((scheduler.timesteps < _level(self.start, scheduler)).sum())
        # Of two calls a step the first one is made again, as diffusers has it.
        left += scheduler.order == 2 and left % 2 == 0
        return len(scheduler.timesteps) - left

    def last(self, scheduler: Any) -> int:
        """Before which call it ends."""
        if self.end is None:
            return len(scheduler.timesteps)
        return int((scheduler.timesteps >= _level(self.end, scheduler)).sum())


def _level(share: float, scheduler: Any) -> int:
    """The timestep at a share of all noise levels."""
    num = scheduler.config.num_train_timesteps
    return round(num - share * num)


class Sampler:
    """One row's sampler: its schedule tables stay on the CPU, so that no step waits for a device.

    `config` is that of the model's own sampler, with its class as `_class_name`.
    `timesteps` are the UNet calls left to make at the start: 7 steps are 13 for Heun, 16 for PNDM.

    Raises ValueError when the schedule cannot be made for that many steps, or has none in the span.
    """

    def __init__(
        self,
        name: str | None,
        options: Mapping[str, Any],
        config: Mapping[str, Any],
        steps: Steps,
        span: Span,
        generator: torch.Generator,
    ):
        name = name or config["_class_name"]
        prediction = Prediction.of(config)
        sampler_class, options = resolve(name, options, prediction)
        self.eta = options.pop("eta", 0.0)
        if "noise_sampler_seed" in _parameters(sampler_class.__init__):
            # Left to itself this class draws its seed from the process's global random state.
            options.setdefault("noise_sampler_seed", generator.initial_seed())
        self.scheduler = sampler_class.from_config(config, **options)
        for key in steps.given:
            check_schedule_taken(name, key, prediction)
        given = steps.given or {"num_inference_steps": steps.num}
        try:
            self.scheduler.set_timesteps(**given, device="cpu")
        except (ValueError, IndexError, RuntimeError) as error:  # of the tables it computes
            asked, way_out = f"schedule of {steps.num} steps", "more steps"
            if steps.given:
                asked, way_out = f"schedule of these {' or '.join(given)}", "others"
            raise ValueError(
                f"sampler {name!r} has no {asked} ({first_line(error)}); "
                f"ask for {way_out} or another sampler"
            ) from None
        if span != Span():
            check_begins_anywhere(name, sampler_class)
        first, last = span.first(self.scheduler, steps.num), span.last(self.scheduler)
        if last <= first:
            raise ValueError(_no_step(span, steps.num))
        self.timesteps = self.scheduler.timesteps[first:last]
        self.num_skipped, self.num_left = first, len(self.scheduler.timesteps) - last
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(first)
        self.position = 0
        accepted = _parameters(sampler_class.step)
        offered = {"eta": self.eta, "generator": generator}
        self._extra = {key: value for key, value in offered.items() if key in accepted}

    @property
    def is_done(self) -> bool:
        return self.position >= len(self.timesteps)

    @property
    def timestep(self) -> torch.Tensor:
        """This step's timestep, a CPU scalar: whole for most samplers, a float for EDM's."""
        return self.timesteps[self.position]

    def start(self, noise_1CHW: torch.Tensor) -> torch.Tensor:
        """First latents of a text-to-image row."""
        return noise_1CHW * self.scheduler.init_noise_sigma

    def noised(self, init_1CHW: torch.Tensor, noise_1CHW: torch.Tensor) -> torch.Tensor:
        """An image's latents with as much noise as those of a row have that comes to this step."""
        if self.is_done:
            return init_1CHW
        # Of one and of zero on the host it is the two factors: what diffusers does on a GPU copies
        # the schedule there each time, and waits.
        now = self.timesteps[self.position : self.position + 1].expand(2)
        one_zero = torch.tensor([1.0, 0.0], dtype=init_1CHW.dtype)
        signal, spread = self.scheduler.add_noise(one_zero, one_zero.flip(0), now)
        return signal * init_1CHW + spread * noise_1CHW

    def scale_input(self, x_1CHW: torch.Tensor) -> torch.Tensor:
        """What the UNet sees of the latents at this step."""
        return self.scheduler.scale_model_input(x_1CHW, self.timestep)

    def advance(self, noise_1CHW: torch.Tensor, x_1CHW: torch.Tensor) -> torch.Tensor:
        """The next latents, in the dtype they had; moves on to the next timestep."""
        if x_1CHW.is_cuda:
            self._draw_on_host(x_1CHW)
        with Uploading() if x_1CHW.is_cuda else nullcontext():
            step = self.scheduler.step(
                noise_1CHW, self.timestep, x_1CHW, **self._extra, return_dict=False
            )
        self.position += 1
        return step[0].to(x_1CHW.dtype)

    def _draw_on_host(self, x_1CHW: torch.Tensor) -> None:
        """Noise of torchsde's too, which would draw on the GPU, where a seed means other noise."""
        if getattr(self.scheduler, "noise_sampler", self) is not None:
            return
        # Needs torchsde.
        from diffusers.schedulers.scheduling_dpmsolver_sde import BrownianTreeNoiseSampler

        sigmas, device = self.scheduler.sigmas, x_1CHW.device
        low, high = sigmas[sigmas > 0].min().item(), sigmas.max().item()
        like_1CHW = torch.empty(x_1CHW.shape, dtype=x_1CHW.dtype)
        seed = self.scheduler.noise_sampler_seed
        tree = BrownianTreeNoiseSampler(like_1CHW, low, high, seed)
        self.scheduler.noise_sampler = lambda *span: upload(tree(*span), device)


def _no_step(span: Span, num: int) -> str:
    share, side = (span.end, "before") if span.end is not None else (span.start, "after")
    return (
        f"denoising_start {share} leaves none of {num} steps {side} it; give another, or more steps"
    )
