"""Timesteps and sigmas of a request's own, against diffusers' pipeline with the same."""

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from PIL import Image

from rayjobs.diffusion.engine import Engine
from rayjobs.diffusion.facts import Usual
from rayjobs.diffusion.model import Model
from rayjobs.diffusion.request import Request
from rayjobs.diffusion.sampler import SAMPLERS, resolve
from rayjobs.diffusion.sampler_names import CLASSES, TAKES_SIGMAS, TAKES_TIMESTEPS
from tests.families import reference_pipeline

pytestmark = pytest.mark.model

TIMESTEPS = (979, 739, 499, 259, 19)
"""Such as LCM's and TCD's samplers take too."""
SIGMAS = (14.615, 2.181, 0.555, 0.0)
ONE_STEP = (799,)
"""Where Hyper's model for one step begins."""


def test_those_that_take_a_schedule_are_those_of_diffusers() -> None:
    takes: dict[str, set[str]] = {"timesteps": set(), "sigmas": set()}
    for name in CLASSES:
        parameters = inspect.signature(getattr(diffusers, name).set_timesteps).parameters
        for schedule in takes.keys() & parameters.keys():
            takes[schedule].add(name)
    assert takes["timesteps"] == TAKES_TIMESTEPS
    others = takes["sigmas"] - TAKES_SIGMAS
    assert others == {"UniPCMultistepScheduler", "EDMEulerScheduler"}
    for name in others:
        with pytest.raises((ValueError, AttributeError)):
            getattr(diffusers, name)().set_timesteps(sigmas=list(SIGMAS))


def asked(name: str, **settings: Any) -> Request:
    return Request(prompt=f"a star, {name}", seed=5, sampler=name, guidance_scale=3.0, **settings)


def test_equal_diffusers(folders: dict[str, Path], tiny: Model, picture: Any) -> None:
    names = [
        name
        for name, (kind, preset) in SAMPLERS.items()
        if kind in TAKES_TIMESTEPS and not preset.get("use_karras_sigmas")
    ]
    requests = [asked(name, timesteps=TIMESTEPS) for name in names]
    requests += [asked("lcm", timesteps=ONE_STEP), asked("euler", sigmas=SIGMAS)]
    requests += [asked("euler", timesteps=TIMESTEPS, init_image=picture(0), strength=0.6)]
    assert len(requests) > 8
    results = list(Engine(tiny, max_rows=len(requests)).generate(requests, keep_pixels=True))
    for result in results:
        assert result.error is None, (result.request.sampler, result.error)
        expected = of_diffusers(folders["sdxl"], result.request)
        difference = (result.pixels - expected).abs().max().item()
        assert difference <= 1e-4, (result.request.sampler, difference)


def of_diffusers(folder: Path, request: Request) -> torch.Tensor:
    img2img = isinstance(request.init_image, Image.Image)
    kind = StableDiffusionXLImg2ImgPipeline if img2img else StableDiffusionXLPipeline
    pipeline, config = reference_pipeline(folder, kind, None)
    sampler_class, options = resolve(request.sampler or "", {})
    pipeline.scheduler = sampler_class.from_config(config, **options)
    given: dict[str, Any] = {"height": 64, "width": 64}
    if img2img:
        given = {"image": request.init_image, "strength": request.strength}
    schedule = {"timesteps": request.timesteps, "sigmas": request.sigmas}
    return pipeline(
        request.prompt,
        guidance_scale=request.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(request.seed),
        output_type="pt",
        **{name: list(values) for name, values in schedule.items() if values is not None},
        **given,
    ).images[0]


def test_others_are_refused_by_name(tiny: Model) -> None:
    requests = [
        asked("ddim", timesteps=TIMESTEPS),
        asked("dpmpp_2m_karras", timesteps=TIMESTEPS),
        asked("heun", sigmas=SIGMAS),
        asked("euler", timesteps=TIMESTEPS, sampler_options={"use_karras_sigmas": True}),
    ]
    results = {r.request.sampler: r.error or "" for r in Engine(tiny).generate(requests)}
    assert "'ddim' takes no timesteps; use one of ddpm, " in results["ddim"]
    assert "dpmpp_2m_karras," not in results["ddim"]
    assert "takes no timesteps" in results["dpmpp_2m_karras"]
    assert "'heun' takes no sigmas; use one of euler" in results["heun"]
    assert "has no schedule of these timesteps (Cannot set `timesteps` with" in results["euler"]


def test_a_model_for_one_step_begins_where_it_is_made_to(tiny: Model) -> None:
    model = replace(tiny, usual=Usual(1, 1.0, "Hyper", (800,)))
    names = ("lcm", "euler", "ddim")
    results = {r.request.sampler: r for r in Engine(model).generate(map(asked, names))}
    assert "made for a step at 800, but sampler 'ddim' takes no timesteps" in results["ddim"].error
    for name in ("lcm", "euler"):
        (given,) = Engine(tiny).generate([asked(name, timesteps=(800,))])
        assert given.image.tobytes() == results[name].image.tobytes()
    (two,) = Engine(model).generate([replace(asked("ddim"), steps=2)])
    assert two.error is None
