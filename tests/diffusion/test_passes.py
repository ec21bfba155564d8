"""Requests of several passes in one mixed batch: diffusers' own recipe, and other rows unmoved."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image

from rayjobs.diffusion.engine import Engine
from rayjobs.diffusion.model import Model, load_model
from rayjobs.diffusion.passes import Pass
from rayjobs.diffusion.request import Request, Result
from rayjobs.diffusion.sampler import resolve
from tests.families import reference_pipeline

pytestmark = pytest.mark.model

Picture = Callable[[int], Image.Image]
TOLERANCE = 1e-4
PLAIN = StableDiffusionXLPipeline, StableDiffusionPipeline
IMAGE_TO_IMAGE = StableDiffusionXLImg2ImgPipeline, StableDiffusionImg2ImgPipeline


def several(picture: Picture) -> list[Request]:
    """By pictures and by latents, with settings of their own or the request's, and three passes."""
    pixel, latent = Pass(scale=1.5, steps=5), Pass(scale=1.3, via="latent", strength=0.6)
    own = replace(pixel, sampler="euler_a", guidance_scale=1.0, strength=0.7)
    each: list[dict[str, Any]] = [
        {"passes": (pixel,), "sampler": "euler_a"},
        {"passes": (latent,), "sampler": "dpmpp_2m", "guidance_scale": 1.0},
        {"passes": (own, latent), "sampler": "heun", "negative_prompt": "blue"},
        {"passes": (latent,), "init_image": picture(3), "strength": 0.7, "sampler": "ddim"},
    ]
    return [
        Request(**{"prompt": f"a red star {n}", "seed": n, "steps": 5 + n % 2} | more)
        for n, more in enumerate(each)
    ]


def plain(picture: Picture) -> list[Request]:
    return [
        Request(prompt="a green star", seed=10, steps=7, sampler="ddim"),
        Request(prompt="a blue star", seed=11, steps=6, width=96, height=96),
        Request(prompt="a white star", seed=13, steps=9, init_image=picture(4)),
    ]


def made(engine: Engine, requests: list[Request]) -> dict[int, Result]:
    results = {result.request.seed: result for result in engine.generate(requests, True)}
    assert [result.error for result in results.values()] == [None] * len(requests)
    return results


def reference(folder: Path, request: Request, first: Image.Image | None) -> torch.Tensor:
    """The same from diffusers' pipelines, as their user would write it: one call after another,
    with one generator.

    Where that goes by a picture, it is the engine's: a number that lies between two levels may be
    rounded to either, which the passes after it would show.
    """
    generator = torch.Generator("cpu").manual_seed(request.seed)
    init, settings = request.init_image, request
    for after in [*request.passes, None]:
        via = {"pixel": "pil", "latent": "latent"}[after.via] if after else "pt"
        images = call(folder, settings, init, generator, via)
        if after is None:
            return images[0]
        if via == "pil":
            assert first is not None
            assert np.abs(np.subtract(first, images[0], dtype=float)).max() <= 1
            width, height = after.size(*first.size, 8)
            init = first.resize((width, height), Image.Resampling.LANCZOS)
        else:
            width, height = after.size(*(8 * side for side in images.shape[:1:-1]), 8)
            init = F.interpolate(images, size=(height // 8, width // 8), mode="bilinear")
        settings = after.settings(request, width, height)
    raise AssertionError


def call(folder: Path, request: Request, init: Any, generator: Any, output_type: str) -> Any:
    classes = PLAIN if init is None else IMAGE_TO_IMAGE
    pipeline, scheduler_config = reference_pipeline(folder, *classes)
    sampler_class, options = resolve(str(request.sampler), {})
    pipeline.scheduler = sampler_class.from_config(scheduler_config, **options)
    picture = {"width": 64, "height": 64} if init is None else {"image": init}
    more = {} if init is None else {"strength": request.strength}
    usual = 5.0 if "XL" in type(pipeline).__name__ else 7.5
    return pipeline(
        request.prompt,
        negative_prompt=request.negative_prompt,
        num_inference_steps=request.steps,
        guidance_scale=usual if request.guidance_scale is None else request.guidance_scale,
        generator=generator,
        output_type=output_type,
        **picture,
        **more,
    ).images


@pytest.mark.parametrize("family", ["sdxl", "sd"])
def test_equals_diffusers(folders: dict[str, Path], family: str, picture: Picture) -> None:
    requests = several(picture)
    engine = Engine(load_model(str(folders[family])), 8, fixed_shape=family == "sd")
    results = made(engine, [*requests, *plain(picture)])
    begun = [replace(it, passes=()) for it in requests if it.passes[0].via == "pixel"]
    pictures = {seed: result.image for seed, result in made(engine, begun).items()}
    for request in requests:
        expected = reference(folders[family], request, pictures.get(request.seed))
        assert results[request.seed].pixels.shape == expected.shape, request.seed
        difference = (results[request.seed].pixels - expected).abs().max().item()
        assert difference <= TOLERANCE, (request.seed, difference)


def test_rows_keep_their_bits(tiny: Model, picture: Picture) -> None:
    """Those of one pass beside some of several, and those of several beside whatever."""
    others, requests = plain(picture), several(picture)
    mixed = made(Engine(tiny, 8), [*requests, *others])
    for apart in (others, requests[1:3]):
        for seed, result in made(Engine(tiny, 8), apart).items():
            assert torch.equal(mixed[seed].pixels, result.pixels), seed


def test_a_mask_stays(tiny: Model, picture: Picture) -> None:
    """What it keeps of the picture is kept, larger, by later passes too."""
    mask = Image.new("L", (64, 64))
    mask.paste(255, (32, 0, 64, 64))
    request = Request(
        prompt="a star",
        steps=4,
        init_image=picture(1),
        mask=mask,
        keep_unmasked=True,
        passes=(Pass(scale=2, strength=0.5),),
    )
    (result,) = Engine(tiny, 2).generate([request])
    known = picture(1).resize((128, 128), Image.Resampling.LANCZOS)
    assert result.image is not None
    kept = (0, 0, 56, 128)  # of what is made anew the filter sees nothing there
    assert result.image.crop(kept).tobytes() == known.crop(kept).tobytes()


def test_progress_and_warnings_are_of_all_passes(tiny: Model) -> None:
    engine = Engine(tiny, 1)
    passes = (Pass(scale=2, steps=4, strength=0.5, guidance_scale=0.5),)
    row_id = engine.add(Request(prompt="a star", steps=3, passes=passes))
    assert engine.rows[row_id].slots_left == 3 * 2 + 2 * 4
    seen = []
    while engine.rows:
        seen.append(engine.progress(row_id))
        engine.step()
    assert sorted(set(seen)) == [(n, 5) for n in range(6)]
    assert engine.num_pending == 0


def test_a_pass_ends_with_its_request(tiny: Model) -> None:
    """Cancelled between two passes, or where the first one's latents are no numbers."""
    engine = Engine(tiny, 2)
    passes = (Pass(strength=0.5),)
    row_id = engine.add(Request(prompt="a star", steps=2, passes=passes))
    while engine.progress(row_id)[0] < 2:
        engine.step()
    assert engine.cancel(row_id)
    assert engine.step() == []
    broken = engine.add(Request(prompt="a star", steps=2, passes=passes))
    engine.rows[broken].latents *= float("nan")
    (result,) = [result for _ in range(4) for result in engine.step()]
    assert "not finite" in str(result.error)


@pytest.mark.parametrize(
    ("message", "each"),
    [
        ("passes.0: scale is 0.5; it must be in 1 .. 8", Pass(scale=0.5)),
        ("passes.0: via is 'pixels'; it must be pixel or latent", Pass(via="pixels")),  # type: ignore
        ("passes.0: strength is 0; it must be above 0", Pass(strength=0)),
        ("passes.0: strength 0.1 of 5 steps leaves no step", Pass(strength=0.1)),
        ("passes.0: steps is 0; it must be in 1 .. 1000", Pass(steps=0, strength=1)),
        ("passes.0: guidance_scale is nan", Pass(guidance_scale=float("nan"))),
        ("unknown sampler 'eule'", Pass(sampler="eule")),
        ("'ipndm' cannot do image-to-image", Pass(sampler="ipndm")),
        ("via is latent, but a mask needs the picture", Pass(via="latent")),
        ("passes has more than 4", None),
    ],
)
def test_what_cannot_be_made_is_refused(
    tiny: Model, message: str, each: Pass | None, picture: Picture
) -> None:
    masked = {"mask": picture(2), "init_image": picture(1)} if "mask" in message else {}
    passes = (Pass(),) * 5 if each is None else (each,)
    (result,) = Engine(tiny, 1).generate([Request(prompt="a", steps=5, passes=passes, **masked)])
    assert message in str(result.error)
