"""IP-Adapters in one mixed batch: diffusers' own pictures, and rows without one unmoved."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
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
from rayjobs.diffusion.model import Model, load_model
from rayjobs.diffusion.request import IpAdapter, Lora, Request, Result
from rayjobs.diffusion.sampler import resolve
from tests.controls import save_lora
from tests.families import reference_pipeline
from tests.ip_adapters import save_encoder, save_ip_adapters

pytestmark = pytest.mark.model

Picture = Callable[[int], Image.Image]
TOLERANCE = 1e-4
ROWS = 8
TEXT_TO_IMAGE = StableDiffusionXLPipeline, StableDiffusionPipeline
IMAGE_TO_IMAGE = StableDiffusionXLImg2ImgPipeline, StableDiffusionImg2ImgPipeline


@dataclass(frozen=True)
class Files:
    """A model's folder, adapters for it by kind, their image encoder, and a LoRA."""

    model: Path
    adapters: dict[str, str]
    encoder: str
    lora: str

    def adapter(self, kind: str, image: Image.Image, scale: float = 1.0) -> IpAdapter:
        return IpAdapter(path=self.adapters[kind], encoder=self.encoder, image=image, scale=scale)


@pytest.fixture(scope="module")
def files(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Files]:
    root, made = tmp_path_factory.mktemp("adapters"), {}
    for name in ("sdxl", "sd"):
        adapters = save_ip_adapters(folders[name], root / name)
        encoder = save_encoder(root / name / "image_encoder")
        lora = save_lora(folders[name], root / f"{name}.safetensors")
        made[name] = Files(folders[name], adapters, encoder, lora)
    return made


@pytest.fixture(scope="module")
def sdxl(files: dict[str, Files]) -> Model:
    return load_model(str(files["sdxl"].model))


def referring(files: Files, picture: Picture) -> list[Request]:
    """One picture, two of several kinds of adapters, and all of it with other properties."""
    plain = files.adapter("plain", picture(50), 0.9)
    plus = files.adapter("plus", picture(51).resize((96, 80)), 0.7)
    full = files.adapter("full", picture(52), 1.2)
    each: list[dict[str, Any]] = [
        {"ip_adapters": (plain,), "loras": (Lora(path=files.lora),)},
        {"ip_adapters": (plus,), "guidance_scale": 1.0},
        {"ip_adapters": (plus, plain), "sampler": "heun", "negative_prompt": "blue"},
        {"ip_adapters": (full, replace(plain, scale=-0.5)), "init_image": picture(3)},
    ]
    return [
        Request(**{"prompt": f"a red star {n}", "seed": n, "steps": 4 + n % 2} | more)
        for n, more in enumerate(each)
    ]


def without(files: Files, picture: Picture) -> list[Request]:
    none = files.adapter("plus", picture(55), 0.0)
    return [
        Request(prompt="a green star", seed=10, steps=5, sampler="ddim"),
        Request(prompt="a blue star", seed=11, steps=4, loras=(Lora(path=files.lora, scale=0.5),)),
        Request(prompt="a pink star", seed=12, steps=4, guidance_scale=1.0, cache_interval=2),
        Request(prompt="a white star", seed=13, steps=6, init_image=picture(4)),
        Request(prompt="a black star", seed=14, steps=3, ip_adapters=(none,)),
    ]


def made(engine: Engine, requests: list[Request]) -> dict[int, Result]:
    results = {result.request.seed: result for result in engine.generate(requests, True)}
    assert [result.error for result in results.values()] == [None] * len(requests)
    return results


def reference(files: Files, request: Request) -> torch.Tensor:
    """The same picture from diffusers' pipeline, as its user would write it; (3, H, W) in 0..1."""
    base, scheduler_config = reference_pipeline(files.model, *TEXT_TO_IMAGE)
    pipeline: Any = base
    arguments: dict[str, Any] = {"height": 64, "width": 64}
    if request.init_image is not None:
        kind: Any = IMAGE_TO_IMAGE[isinstance(base, StableDiffusionPipeline)]
        pipeline = kind(**base.components)
        arguments = {"image": request.init_image, "strength": request.strength}
    pipeline.set_progress_bar_config(disable=True)
    sampler, options = resolve(request.sampler or scheduler_config["_class_name"], {})
    pipeline.scheduler = sampler.from_config(scheduler_config, **options)
    names = [Path(each.path).name for each in request.ip_adapters]
    pipeline.load_ip_adapter(
        str(Path(request.ip_adapters[0].path).parent), subfolder="", weight_name=names
    )
    pipeline.set_ip_adapter_scale([each.scale for each in request.ip_adapters])
    usual = 5.0 if "XL" in type(pipeline).__name__ else 7.5
    if request.loras:
        pipeline.load_lora_weights(request.loras[0].path)
    images = pipeline(
        request.prompt,
        negative_prompt=request.negative_prompt,
        ip_adapter_image=[each.image for each in request.ip_adapters],
        num_inference_steps=request.steps,
        guidance_scale=usual if request.guidance_scale is None else request.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(request.seed),
        output_type="pt",
        **arguments,
    ).images
    if request.loras:
        pipeline.unload_lora_weights()
    pipeline.unload_ip_adapter()
    return images[0]


@pytest.mark.parametrize("family", ["sdxl", "sd"])
def test_equals_diffusers_and_moves_no_other(
    files: dict[str, Files], family: str, picture: Picture
) -> None:
    requests, others = referring(files[family], picture), without(files[family], picture)
    model, fixed = load_model(str(files[family].model)), family == "sdxl"
    mixed = made(Engine(model, ROWS, fixed_shape=fixed), [*requests, *others])
    for request in requests:
        expected = reference(files[family], request)
        difference = (mixed[request.seed].pixels - expected).abs().max().item()
        assert difference <= TOLERANCE, (request.seed, difference)
    silent = [*others[:-1], replace(others[-1], ip_adapters=())]
    for apart in (silent, requests[:1], requests[2:]) if fixed else ():
        for seed, result in made(Engine(model, ROWS), apart).items():
            assert torch.equal(mixed[seed].pixels, result.pixels), seed


def test_each_picture_moves_the_row(files: dict[str, Files], sdxl: Model, picture: Picture) -> None:
    """Where deep features are reused, too."""
    whole = replace(referring(files["sdxl"], picture)[2], seed=1, sampler=None)
    both = whole.ip_adapters
    for cache_interval, uses in ((1, (both[:0], both[:1], both)), (2, (both[:0], both))):
        requests = [replace(whole, ip_adapters=use, cache_interval=cache_interval) for use in uses]
        results = Engine(sdxl, ROWS).generate(requests, True)
        pixels = {result.request: result.pixels for result in results}
        for one, other in itertools.pairwise(requests):
            assert (pixels[one] - pixels[other]).abs().max() > 0.01


def test_a_picture_is_read_once(
    files: dict[str, Files], sdxl: Model, picture: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, read = Engine(sdxl, ROWS), []
    use = files["sdxl"].adapter("plus", picture(1))
    encoder = engine.ip_adapters.load(use.path, use.encoder).encoder
    assert engine.ip_adapters.load(files["sdxl"].adapters["plain"], use.encoder).encoder is encoder
    call = encoder.read
    monkeypatch.setattr(encoder, "read", lambda image, *a: read.append(image) or call(image, *a))
    requests = [Request(prompt="a star", seed=n, steps=2, ip_adapters=(use,)) for n in range(3)]
    made(engine, requests)
    made(engine, [Request(prompt="no star", steps=2, ip_adapters=(replace(use, scale=2.0),))])
    assert len(read) == 2  # the picture, and none for the negative prompts


def test_what_does_not_fit_is_refused(
    files: dict[str, Files], sdxl: Model, picture: Picture, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    engine, good = Engine(sdxl, ROWS), files["sdxl"].adapter("plain", picture(1))
    (tmp_path / "adapter.bin").write_bytes(b"\x80\x02")
    face = {"image_proj.proj.0.weight": (8, 8), "ip_adapter.1.to_k_ip.weight": (8, 8)}
    save_file(
        {name: torch.zeros(shape) for name, shape in face.items()}, tmp_path / "face.safetensors"
    )
    unet = str(files["sdxl"].model / "unet")
    wide = save_encoder(tmp_path / "wide")
    config = tmp_path / "wide" / "config.json"
    config.write_text(config.read_text().replace('"projection_dim": 24', '"projection_dim": 99'))
    cases: list[tuple[str, dict[str, Any]]] = [
        ("plain.safetensors is not for this model", {"path": files["sd"].adapters["plain"]}),
        ("adapter.bin is a pickle", {"path": str(tmp_path / "adapter.bin")}),
        (
            "of a kind that is not read, such as FaceID",
            {"path": str(tmp_path / "face.safetensors")},
        ),
        ("has no ip_adapter. tensors", {"path": files["sdxl"].lora}),
        ("is a folder; give a .safetensors file", {"path": unet}),
        ("nowhere does not exist; give its folder", {"encoder": "nowhere"}),
        ("is a None; give a CLIPVisionModelWithProjection", {"encoder": unet}),
        ("reads 24 numbers, the encoder's projection_dim is 99", {"encoder": wide}),
        ("reference image cannot be read", {"image": b"nothing"}),
        ("the scale of an IP-Adapter is nan", {"scale": float("nan")}),
    ]
    for message, wrong in cases:
        request = Request(prompt="a star", ip_adapters=(replace(good, **wrong),))
        (result,) = engine.generate([request])
        assert message in str(result.error), (message, result.error)
