"""Masked image-to-image against diffusers' inpainting pipelines; previews against the picture."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline, StableDiffusionXLInpaintPipeline
from PIL import Image

from rayjobs.diffusion.engine import Engine
from rayjobs.diffusion.model import Model, load_model
from rayjobs.diffusion.request import Request
from rayjobs.diffusion.sampler import SAMPLERS, resolve
from tests.families import reference_pipeline, save_inpainting

pytestmark = pytest.mark.model

Picture = Callable[[int], Image.Image]
TOLERANCE = 1e-4


def half_mask(side: int = 64) -> Image.Image:
    values = np.zeros((side, side), np.uint8)
    values[:, side // 2 :] = 255
    return Image.fromarray(values)


def reference(folder: Path, request: Request) -> torch.Tensor:
    pipeline, scheduler_config = reference_pipeline(
        folder, StableDiffusionXLInpaintPipeline, StableDiffusionInpaintPipeline
    )
    sampler_class, options = resolve(str(request.sampler), request.sampler_options)
    pipeline.scheduler = sampler_class.from_config(scheduler_config, **options)
    return pipeline(
        request.prompt,
        image=request.init_image,
        mask_image=request.mask,
        height=64,
        width=64,
        strength=request.strength,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(request.seed),
        output_type="pt",
    ).images[0]


@pytest.mark.parametrize("kind", ["sdxl", "sd"])
def test_equals_diffusers(folders: dict[str, Path], kind: str, picture: Picture) -> None:
    samplers = ["euler", "euler_a", "ddim", "dpmpp_2m", "heun", "unipc", "lcm"]
    requests = [
        Request(
            prompt="a red star",
            seed=number,
            steps=6,
            sampler=name,
            guidance_scale=[1.0, 5.0][number % 2],
            init_image=picture(number),
            mask=half_mask(),
            strength=[0.5, 1.0][number // 2 % 2],
        )
        for number, name in enumerate(samplers)
    ]
    plain = Request(prompt="a blue moon", seed=1, steps=4, width=64, height=64)
    engine = Engine(load_model(str(folders[kind])), max_rows=8, fixed_shape=False)
    for result in engine.generate([*requests, plain], keep_pixels=True):
        assert result.error is None, (result.request.sampler, result.error)
        if result.request is not plain:
            difference = (result.pixels - reference(folders[kind], result.request)).abs().max()
            assert difference <= TOLERANCE, (result.request.sampler, difference)


@pytest.mark.parametrize("kind", ["sdxl", "sd"])
def test_nine_channels_equal_diffusers(
    folders: dict[str, Path], kind: str, picture: Picture, tmp_path: Path
) -> None:
    """Each row of one batch, whatever its strength."""
    folder = save_inpainting(folders[kind], tmp_path / "model")
    requests = [
        Request(
            prompt="a red star",
            seed=number,
            steps=6,
            sampler=name,
            guidance_scale=[1.0, 5.0][number % 2],
            init_image=picture(number),
            mask=half_mask(),
            strength=[0.5, 1.0][number // 2 % 2],
        )
        for number, name in enumerate(["euler", "euler_a", "ddim", "dpmpp_2m"])
    ]
    engine = Engine(load_model(str(folder)), max_rows=4, fixed_shape=kind == "sd")
    for result in engine.generate(requests, keep_pixels=True):
        assert result.error is None, (result.request.sampler, result.error)
        difference = (result.pixels - reference(folder, result.request)).abs().max()
        assert difference <= TOLERANCE, (result.request.sampler, difference)
    (plain,) = engine.generate([Request(prompt="a star", init_image=picture(1))])
    assert "give init_image and mask (all white for the whole picture)" in str(plain.error)


def test_known_pixels_are_kept(starter: Model, picture: Picture) -> None:
    request = Request(
        prompt="a photo of a red star on a blue background",
        init_image=picture(0),
        mask=half_mask(),
        strength=1.0,
        steps=6,
        keep_unmasked=True,
    )
    (result,) = Engine(starter, max_rows=2).generate([request])
    made, known = np.asarray(result.image), np.asarray(picture(0))
    assert np.array_equal(made[:, :32], known[:, :32])
    assert np.abs(made[:, 32:].astype(int) - known[:, 32:]).mean() > 10


def test_a_mask_needs_a_picture(tiny: Model) -> None:
    (result,) = Engine(tiny, max_rows=1).generate([Request(prompt="a", mask=half_mask())])
    assert "a mask needs an init_image" in str(result.error)


# IPNDM hands the UNet timesteps of another scale (0..1), whose predictions say nothing.
SKETCHED = [name for name in SAMPLERS if not name.startswith("edm") and name != "ipndm"]
KINDS = ["euler", "ddim", "heun", "dpmpp_2m", "dpmpp_sde", "unipc", "pndm", "lcm"]
"""One of each way to hold latents, and to call the network."""


@pytest.mark.parametrize("samplers", [KINDS, pytest.param(SKETCHED, marks=pytest.mark.slow)])
def test_a_preview_has_the_picture_s_colours(starter: Model, samplers: list[str]) -> None:
    """With each sampler, in one batch."""
    engine = Engine(starter, max_rows=len(samplers))
    prompt = "a photo of a red star on a blue background"
    names = {
        engine.add(Request(prompt=prompt, seed=3, steps=12, sampler=name)): name
        for name in samplers
    }
    assert all(engine.preview(row_id) is None for row_id in names)
    shown: dict[str, list[Image.Image]] = {name: [] for name in samplers}
    finals: dict[str, Image.Image] = {}
    while engine.rows:
        finals |= {str(result.request.sampler): result.image for result in engine.step()}
        for row_id in engine.rows:
            sketches = shown[names[row_id]]
            done, total = engine.progress(row_id)
            assert done <= total
            if done > len(sketches):  # a step is not of all rows
                sketches.append(engine.preview(row_id))
                assert len(sketches) == done
    for name, sketches in shown.items():
        final = finals[name].resize(sketches[0].size, Image.Resampling.BOX)
        errors = [np.abs(np.subtract(each, final, dtype=float)).mean() for each in sketches]
        assert errors[-1] < 20, name
        assert errors[len(errors) // 2] < 45, name


def test_a_preview_of_an_edm_model(folders: dict[str, Path]) -> None:
    engine = Engine(load_model(str(folders["playground"])), max_rows=1)
    row_id = engine.add(Request(prompt="a", steps=4))
    engine.step()
    shown = engine.preview(row_id)
    assert shown is not None
    assert shown.size == (8, 8)
