"""A refiner, or another model, in a pass of a mixed batch: diffusers' two calls, others unmoved."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from PIL import Image

from rayjobs.diffusion.engine import Engine
from rayjobs.diffusion.model import Model, load_model
from rayjobs.diffusion.passes import Pass
from rayjobs.diffusion.request import Request, Result
from rayjobs.diffusion.sampler import resolve
from rayjobs.diffusion.weights import Source
from tests import ldm
from tests.families import reference_pipeline, save_inpainting, save_refiner

pytestmark = pytest.mark.model

Picture = Callable[[int], Image.Image]
Others = Callable[[str], Path]
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def refiner(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_refiner(folders["sdxl"], tmp_path_factory.mktemp("models") / "refiner")


def refined(refiner: Path, base: Path, picture: Picture) -> list[Request]:
    """As experts, of two calls a step too and from a picture, and by strength; and both models by
    turns."""
    expert = Pass(model=str(refiner), denoising_start=0.6)
    over = Pass(model=str(refiner), strength=0.5, steps=6)
    each: list[dict[str, Any]] = [
        {"passes": (expert,), "sampler": "euler_a"},
        {"passes": (replace(expert, denoising_start=0.75),), "negative_prompt": "blue"},
        {"passes": (replace(expert, guidance_scale=1.0),), "sampler": "heun"},
        {"passes": (expert,), "sampler": "dpmpp_2m", "guidance_scale": 1.0},
        {"passes": (expert,), "init_image": picture(3), "strength": 0.9, "sampler": "ddim"},
        {
            "passes": (
                replace(over, sampler="ddim"),
                Pass(model=str(base), denoising_start=0.8, guidance_scale=3.0),
            )
        },
        {"passes": (replace(over, via="latent", scale=1.5),), "sampler": "euler"},
        {"passes": (expert, Pass(model=str(base), denoising_start=0.8)), "sampler": "euler"},
    ]
    return [
        Request(**{"prompt": f"a red star {n}", "seed": n, "steps": 9 + n % 2} | more)
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


def reference(base: Path, request: Request, first: Image.Image | None) -> torch.Tensor:
    """diffusers' calls, one after another with one generator; a picture between is the engine's,
    since a number between two levels may be rounded to either."""
    generator = torch.Generator("cpu").manual_seed(request.seed)
    ends = [*(each.denoising_start for each in request.passes), None]
    first_of = {"strength": request.strength, "end": ends[0]}
    outputs = ["pil" if each.way == "pixel" else "latent" for each in request.passes] + ["pt"]
    settings = request
    images = call(base, request, request.init_image, generator, outputs[0], **first_of)
    for number, each in enumerate(request.passes):
        if outputs[number] == "pil":
            assert first is not None
            assert np.abs(np.subtract(first, images[0], dtype=float)).max() <= 1
            images = first
        elif each.scale != 1:
            images = torch.nn.functional.interpolate(
                images, scale_factor=each.scale, mode="bilinear"
            )
        before = settings
        settings = each.settings(request, None, None)
        if each.way == "as is":
            settings = replace(settings, sampler=before.sampler, steps=before.steps)
        span = {"start": each.denoising_start, "end": ends[number + 1]}
        span |= {"strength": settings.strength}
        path = Path(str(each.model))
        images = call(path, settings, images, generator, outputs[number + 1], **span)
    return images[0]


def call(
    folder: Path, request: Request, init: Any, generator: Any, output_type: str, **span: Any
) -> Any:
    kind = StableDiffusionXLPipeline if init is None else StableDiffusionXLImg2ImgPipeline
    pipeline, scheduler_config = reference_pipeline(folder, kind, None)
    name = request.sampler or "euler"
    sampler_class, options = resolve(name, {})
    pipeline.scheduler = sampler_class.from_config(scheduler_config, **options)
    where = {"width": 64, "height": 64} if init is None else {"image": init}
    if init is not None:
        where |= {"strength": span["strength"], "denoising_start": span.get("start")}
    return pipeline(
        request.prompt,
        negative_prompt=request.negative_prompt,
        num_inference_steps=request.steps,
        guidance_scale=5.0 if request.guidance_scale is None else request.guidance_scale,
        generator=generator,
        output_type=output_type,
        denoising_end=span["end"],
        **where,
    ).images


def test_equals_diffusers(folders: dict[str, Path], refiner: Path, picture: Picture) -> None:
    base = folders["sdxl"]
    requests = refined(refiner, base, picture)
    engine = Engine(load_model(str(base)), 8, fixed_shape=False)
    results = made(engine, [*requests, *plain(picture)])
    begun = {it.seed: replace(it, passes=()) for it in requests if it.seed == 5}
    pictures = {seed: result.image for seed, result in made(engine, list(begun.values())).items()}
    for request in requests:
        expected = reference(base, request, pictures.get(request.seed))
        assert results[request.seed].pixels.shape == expected.shape, request.seed
        difference = (results[request.seed].pixels - expected).abs().max().item()
        assert difference <= TOLERANCE, (request.seed, difference)


def test_rows_keep_their_bits(
    tiny: Model, folders: dict[str, Path], refiner: Path, picture: Picture
) -> None:
    """Those of one model beside some of two, and those of two beside whatever."""
    others, requests = plain(picture)[:2], refined(refiner, folders["sdxl"], picture)[:3]
    mixed = made(Engine(tiny, 4), [*requests, *others])
    for apart in (others, requests[1:2]):
        for seed, result in made(Engine(tiny, 4), apart).items():
            assert torch.equal(mixed[seed].pixels, result.pixels), seed


@pytest.fixture
def others(folders: dict[str, Path], refiner: Path, tmp_path: Path) -> Others:
    """Models that cannot go on with the tiny one's latents, and one that can."""

    def make(kind: str) -> Path:
        if kind == "fill":
            return save_inpainting(folders["sdxl"], tmp_path / kind)
        if not kind:
            return refiner
        pipeline = StableDiffusionXLImg2ImgPipeline.from_pretrained(refiner)
        if kind == "vae":
            pipeline.vae.register_to_config(scaling_factor=0.5)
        else:
            pipeline.scheduler.register_to_config(beta_end=0.02)
        pipeline.save_pretrained(tmp_path / kind)
        return tmp_path / kind

    return make


@pytest.mark.parametrize(
    ("message", "kind", "each"),
    [
        ("denoising_start is 1.0; it must be between 0 and 1", "", {"denoising_start": 1.0}),
        ("denoising_start needs a model", None, {"denoising_start": 0.5}),
        ("denoising_start and strength are both", "", {"denoising_start": 0.5, "strength": 0.5}),
        ("denoising_start and sampler are both", "", {"denoising_start": 0.5, "sampler": "ddim"}),
        ("as they are; leave scale out", "", {"denoising_start": 0.5, "scale": 2}),
        ("0.0001 leaves none of 5 steps before it", "", {"denoising_start": 0.0001}),
        ("0.999 leaves none of 5 steps after it", "", {"denoising_start": 0.999}),
        ("model '/is/not/here'", "/is/not/here", {}),
        ("have scaling_factor 0.18215, those of the pass's 0.5", "vae", {"denoising_start": 0.5}),
        ("hand over the picture instead", "vae", {"via": "latent", "strength": 0.5}),
        ("beta_end is 0.012 there and 0.02 here", "betas", {"denoising_start": 0.5}),
        ("only makes masked parts of pictures anew", "fill", {"strength": 0.5}),
    ],
)
def test_what_cannot_be_made_is_refused(
    tiny: Model, others: Others, message: str, kind: str | None, each: dict[str, Any]
) -> None:
    path = kind if kind is None or kind.startswith("/") else str(others(kind))
    request = Request(prompt="a", steps=5, passes=(Pass(model=path, **each),))
    (result,) = Engine(tiny, 1).generate([request])
    assert message in str(result.error)


def test_a_refiner_s_single_file(refiner: Path, tmp_path: Path) -> None:
    pipeline = StableDiffusionXLImg2ImgPipeline.from_pretrained(refiner)
    file = str(ldm.save(tmp_path / "refiner.safetensors", ldm.tensors(pipeline)))
    model = load_model(Source(uri=file, config=str(refiner), follows=True))
    assert model.is_refiner
    (encoder,) = model.text_encoders
    parts = {"unet": model.unet, "vae": model.vae, "text_encoder_2": encoder}
    for name, part in parts.items():
        weights = getattr(pipeline, name).state_dict()
        assert all(torch.equal(t, weights[key]) for key, t in part.state_dict().items())


def test_a_refiner_is_no_base(refiner: Path) -> None:
    with pytest.raises(ValueError, match="name it as the model of one of passes"):
        load_model(str(refiner))
