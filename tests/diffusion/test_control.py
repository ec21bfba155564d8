"""ControlNets in one mixed batch: diffusers' own pictures, and rows without one unmoved."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    MultiControlNetModel,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image

from rayjobs.diffusion.engine import Engine
from rayjobs.diffusion.model import Model, load_model
from rayjobs.diffusion.request import Control, Lora, Request, Result
from rayjobs.diffusion.sampler import resolve
from tests.controls import save_controlnets, save_lora
from tests.families import reference_pipeline

pytestmark = pytest.mark.model

Picture = Callable[[int], Image.Image]
TOLERANCE = 1e-4
LANCZOS = Image.Resampling.LANCZOS
ROWS = 8
PLAIN = StableDiffusionXLPipeline, StableDiffusionPipeline
TEXT_TO_IMAGE = StableDiffusionXLControlNetPipeline, StableDiffusionControlNetPipeline
IMAGE_TO_IMAGE = (
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionControlNetImg2ImgPipeline,
)


@dataclass(frozen=True)
class Files:
    """A model's folder, two ControlNets for it and an adapter."""

    model: Path
    nets: list[str]
    lora: str


@pytest.fixture(scope="module")
def files(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Files]:
    root, made = tmp_path_factory.mktemp("nets"), {}
    for name in ("sdxl", "sd"):
        lora = save_lora(folders[name], root / f"{name}.safetensors")
        made[name] = Files(folders[name], save_controlnets(folders[name], root / name), lora)
    return made


@pytest.fixture(scope="module")
def sdxl(files: dict[str, Files]) -> Model:
    return load_model(str(files["sdxl"].model))


def controlled(files: Files, picture: Picture) -> list[Request]:
    """One control, two of one picture each, intervals, and all of it with other properties."""
    one = Control(path=files.nets[0], image=picture(50), scale=1.5)
    wide = Control(path=files.nets[0], image=picture(51).resize((96, 80)))
    late = Control(path=files.nets[1], image=picture(52), scale=0.8, start=0.3)
    early = Control(path=files.nets[1], image=picture(53), end=0.5)
    each: list[dict[str, Any]] = [
        {"controls": (one,), "loras": (Lora(path=files.lora),)},
        {"controls": (wide, late), "guidance_scale": 1.0},
        {"controls": (early,), "sampler": "heun", "negative_prompt": "blue"},
        {"controls": (early, one), "init_image": picture(3), "strength": 0.6},
    ]
    return [
        Request(**{"prompt": f"a red star {n}", "seed": n, "steps": 5 + n % 2} | more)
        for n, more in enumerate(each)
    ]


def plain(files: Files, picture: Picture) -> list[Request]:
    return [
        Request(prompt="a green star", seed=10, steps=7, sampler="ddim"),
        Request(prompt="a blue star", seed=11, steps=6, loras=(Lora(path=files.lora, scale=0.5),)),
        Request(prompt="a pink star", seed=12, steps=5, guidance_scale=1.0, cache_interval=2),
        Request(prompt="a white star", seed=13, steps=9, init_image=picture(4)),
    ]


def made(engine: Engine, requests: list[Request]) -> dict[int, Result]:
    results = {result.request.seed: result for result in engine.generate(requests, True)}
    assert [result.error for result in results.values()] == [None] * len(requests)
    return results


def reference(files: Files, request: Request) -> torch.Tensor:
    """The same picture from diffusers' pipeline, as its user would write it; (3, H, W) in 0..1."""
    base, scheduler_config = reference_pipeline(files.model, *PLAIN)
    controls = request.controls
    nets = [ControlNetModel.from_pretrained(control.path) for control in controls]
    net = MultiControlNetModel(nets) if len(nets) > 1 else nets[0]
    classes = TEXT_TO_IMAGE if request.init_image is None else IMAGE_TO_IMAGE
    pipeline: Any = classes[isinstance(base, StableDiffusionPipeline)](
        **base.components, controlnet=net
    )
    pipeline.set_progress_bar_config(disable=True)
    name = request.sampler or scheduler_config["_class_name"]
    sampler, options = resolve(name, {})
    pipeline.scheduler = sampler.from_config(scheduler_config, **options)
    each = {
        "image": [control.image for control in controls],
        "controlnet_conditioning_scale": [control.scale for control in controls],
        "control_guidance_start": [control.start for control in controls],
        "control_guidance_end": [control.end for control in controls],
    }
    arguments: dict[str, Any] = each if len(nets) > 1 else {key: it[0] for key, it in each.items()}
    if request.init_image is not None:
        arguments["control_image"] = arguments["image"]
        arguments |= {"image": request.init_image, "strength": request.strength}
    usual = 5.0 if "XL" in type(pipeline).__name__ else 7.5
    if request.loras:
        pipeline.load_lora_weights(request.loras[0].path)
    images = pipeline(
        request.prompt,
        negative_prompt=request.negative_prompt,
        height=64,
        width=64,
        num_inference_steps=request.steps,
        guidance_scale=usual if request.guidance_scale is None else request.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(request.seed),
        output_type="pt",
        **arguments,
    ).images
    if request.loras:
        pipeline.unload_lora_weights()
    return images[0]


@pytest.mark.parametrize("family", ["sdxl", "sd"])
def test_equals_diffusers(files: dict[str, Files], family: str, picture: Picture) -> None:
    requests = controlled(files[family], picture)
    model = load_model(str(files[family].model))
    mixed = [*requests, *plain(files[family], picture)]
    results = made(Engine(model, ROWS, fixed_shape=family == "sd"), mixed)
    for request in requests:
        expected = reference(files[family], request)
        difference = (results[request.seed].pixels - expected).abs().max().item()
        assert difference <= TOLERANCE, (request.seed, difference)


def test_rows_keep_their_bits(files: dict[str, Files], sdxl: Model, picture: Picture) -> None:
    """Those without a control beside some with one, and those with one beside whatever."""
    others, requests = plain(files["sdxl"], picture), controlled(files["sdxl"], picture)
    mixed = made(Engine(sdxl, ROWS), [*requests, *others])
    for apart in (others, requests[1:3]):
        for seed, result in made(Engine(sdxl, ROWS), apart).items():
            assert torch.equal(mixed[seed].pixels, result.pixels), seed


def test_each_control_moves_its_picture(
    files: dict[str, Files], sdxl: Model, picture: Picture
) -> None:
    whole = controlled(files["sdxl"], picture)[1]
    fewer = [replace(whole, seed=1, controls=whole.controls[:number]) for number in (0, 1, 2)]
    engine = Engine(sdxl, ROWS)
    (none, one, two) = (made(engine, [request])[1].pixels for request in fewer)
    assert (none - one).abs().max() > 0.01 < (one - two).abs().max()


def test_only_rows_in_their_interval_are_in_a_call(
    files: dict[str, Files], sdxl: Model, picture: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(sdxl, ROWS, fixed_shape=False)
    net, slots = engine.controls.load(files["sdxl"].nets[0]), []
    call = net.replay
    monkeypatch.setattr(net, "replay", lambda x, *rest: slots.append(len(x)) or call(x, *rest))
    control = Control(path=files["sdxl"].nets[0], image=picture(1))
    early, late = replace(control, end=0.5), replace(control, start=0.75)
    common: dict[str, Any] = {"prompt": "a star", "steps": 4, "guidance_scale": 3.0}
    made(
        engine,
        [
            Request(**common, seed=1, controls=(early,)),
            Request(**common | {"guidance_scale": 1.0}, seed=2, controls=(early, late)),
            Request(**common, seed=3, controls=(replace(control, scale=0.0),)),
            Request(**common, seed=4),
        ],
    )
    assert slots == [3, 3, 1]  # of 7; and no call at the third step


def test_edges_are_drawn_at_the_image_s_size(
    files: dict[str, Files], sdxl: Model, picture: Picture
) -> None:
    """As OpenCV draws them of the picture as it is stretched; the result is that of such edges."""
    large = picture(1).resize((200, 120))
    grey = cv2.cvtColor(np.asarray(large.resize((64, 96), LANCZOS)), cv2.COLOR_RGB2GRAY)
    edges = Image.fromarray(cv2.Canny(grey, 100, 200)).convert("RGB")
    control = Control(path=files["sdxl"].nets[0], image=large)
    common: dict[str, Any] = {"prompt": "a star", "steps": 2, "width": 64, "height": 96}
    each = [replace(control, preprocess="canny"), replace(control, image=edges), control]
    requests = [Request(**common, controls=(one,), seed=3) for one in each]
    drawn, given, plain = Engine(sdxl, ROWS).generate(requests, keep_pixels=True)
    assert torch.equal(drawn.pixels, given.pixels)
    assert not torch.equal(drawn.pixels, plain.pixels)


def test_what_does_not_fit_is_refused(
    files: dict[str, Files], sdxl: Model, picture: Picture, tmp_path: Path
) -> None:
    engine = Engine(sdxl, ROWS)
    good = Control(path=files["sdxl"].nets[0], image=picture(1))
    unet = str(files["sdxl"].model / "unet")
    (tmp_path / "config.json").write_text('{"_class_name": "ControlNetModel"}')
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x02")
    cases: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("is not for this model: its cross_attention_dim is 32", {"path": files["sd"].nets[0]}, {}),
        ("is a UNet2DConditionModel; only a ControlNetModel", {"path": unet}, {}),
        ("is a file; give a diffusers folder", {"path": f"{unet}/config.json"}, {}),
        ("nowhere does not exist", {"path": "nowhere"}, {}),
        ("is a pickle", {"path": str(tmp_path)}, {}),
        ("control image cannot be read", {"image": b"nothing"}, {}),
        ("the scale of a control is inf", {"scale": float("inf")}, {}),
        ("a control goes from 0.5 to 0.5", {"start": 0.5, "end": 0.5}, {}),
        ("the request has controls", {}, {"cache_interval": 2}),
        ("preprocess is 'depth'; it must be canny", {"preprocess": "depth"}, {}),
    ]
    for message, of_control, of_request in cases:
        control = replace(good, **of_control)
        request = Request(prompt="a star", controls=(control,), **of_request)
        (result,) = engine.generate([request])
        assert message in str(result.error)
