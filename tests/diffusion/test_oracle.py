"""The engine's pictures against diffusers' own pipelines, every sampler in one mixed batch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image

from rayjobs.diffusion.engine import Engine
from rayjobs.diffusion.model import load_model
from rayjobs.diffusion.request import Request
from rayjobs.diffusion.sampler import SAMPLERS, resolve
from rayjobs.diffusion.sampler_names import EDM, Prediction
from tests.families import reference_pipeline

pytestmark = pytest.mark.model

Picture = Callable[[int], Image.Image]
TOLERANCE = 1e-4
TEXT_TO_IMAGE = StableDiffusionXLPipeline, StableDiffusionPipeline
IMAGE_TO_IMAGE = StableDiffusionXLImg2ImgPipeline, StableDiffusionImg2ImgPipeline


def mixed_requests(family: str, picture: Picture) -> list[Request]:
    """Every sampler as text-to-image and as image-to-image, no two rows with the same settings."""
    requests, edm = [], family == "playground"
    # diffusers 0.42's clip_skip for Stable Diffusion fails under transformers 5.6 and later.
    clip_skips = [None, None if family == "sd" else 1]
    names = [name for name, (class_name, _) in SAMPLERS.items() if (class_name in EDM) == edm]
    if family == "sd":  # another pipeline; the samplers are the same
        names = names[::3]
    for number, name in enumerate(names):
        inits = [None] if name == "ipndm" else [None, picture(number)]  # it cannot add noise
        for init_image in inits:
            options = {"noise_sampler_seed": 3} if name.startswith("dpmpp_sde") else {}
            requests.append(
                Request(
                    prompt=f"a photo of a red star, {name}",
                    negative_prompt=[None, "", "blue"][number % 3],
                    seed=100 + number,
                    steps=5 + number % 3,
                    sampler=name,
                    sampler_options=options,
                    guidance_scale=[1.0, 4.0, 7.5][number % 3],
                    guidance_rescale=0.7 if number % 4 == 0 else 0.0,
                    clip_skip=clip_skips[number % 2],
                    init_image=init_image,
                    strength=0.6,
                )
            )
    return requests


def reference(folder: Path, request: Request, edm: bool) -> torch.Tensor:
    """The same picture from diffusers' pipeline, as its user would write it; (3, H, W) in 0..1."""
    img2img = request.init_image is not None
    classes = IMAGE_TO_IMAGE if img2img else TEXT_TO_IMAGE
    pipeline, scheduler_config = reference_pipeline(folder, *classes)
    sampler_class, options = resolve(
        request.sampler, request.sampler_options, Prediction(is_edm=edm)
    )
    pipeline.scheduler = sampler_class.from_config(scheduler_config, **options)
    arguments: dict[str, Any] = {"height": 64, "width": 64}
    if img2img:
        arguments = {"image": request.init_image, "strength": request.strength}
    if not isinstance(pipeline, StableDiffusionImg2ImgPipeline):  # it has no such argument
        arguments["guidance_rescale"] = request.guidance_rescale
    images = pipeline(
        request.prompt,
        negative_prompt=request.negative_prompt,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance_scale,
        clip_skip=request.clip_skip,
        generator=torch.Generator("cpu").manual_seed(request.seed),
        output_type="pt",
        **arguments,
    ).images
    return images[0]


def test_equals_diffusers(folders: dict[str, Path], family: str, picture: Picture) -> None:
    folder, edm = folders[family], family == "playground"
    requests = mixed_requests(family, picture)
    engine = Engine(load_model(str(folder)), max_rows=len(requests))
    results = list(engine.generate(requests, keep_pixels=True))
    assert len(results) == len(requests)
    for result in results:
        request = result.request
        if family == "sd" and request.init_image is not None and request.guidance_rescale:
            continue  # diffusers' Stable Diffusion image-to-image has no guidance_rescale
        expected = reference(folder, request, edm)
        assert result.error is None, (request.sampler, result.error)
        difference = (result.pixels - expected).abs().max().item()
        assert difference <= TOLERANCE, (request.sampler, request.init_image, difference)
