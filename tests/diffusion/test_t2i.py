"""T2I-Adapters in one mixed batch: diffusers' own pictures, and rows without one unmoved."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    MultiAdapter,
    StableDiffusionAdapterPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLAdapterPipeline,
    StableDiffusionXLPipeline,
    T2IAdapter,
)
from PIL import Image

from rayjobs.diffusion.control.t2i import check_fit
from rayjobs.diffusion.engine import Engine
from rayjobs.diffusion.model import load_model
from rayjobs.diffusion.request import Control, Lora, Request, Result
from rayjobs.diffusion.sampler import resolve
from tests.controls import save_controlnets, save_lora, save_t2i_adapters
from tests.families import reference_pipeline

pytestmark = pytest.mark.model

Picture = Callable[[int], Image.Image]
TOLERANCE = 1e-4
ROWS = 8
PLAIN = StableDiffusionXLPipeline, StableDiffusionPipeline
ADAPTED = StableDiffusionXLAdapterPipeline, StableDiffusionAdapterPipeline


@dataclass(frozen=True)
class Files:
    """A model's folder, T2I-Adapters and a ControlNet for it, and a LoRA."""

    model: Path
    adapters: list[str]
    net: str
    lora: str


@pytest.fixture(scope="module")
def files(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Files]:
    root, made = tmp_path_factory.mktemp("t2i"), {}
    adapters = save_t2i_adapters(root)
    for name in ("sdxl", "sd"):
        (net,) = save_controlnets(folders[name], root / name, 1)
        lora = save_lora(folders[name], root / f"{name}.safetensors")
        made[name] = Files(folders[name], adapters, net, lora)
    return made


def adapted(files: Files, picture: Picture) -> list[Request]:
    """One adapter, two, one for a part of the schedule, one of grey pictures.

    Their samplers call the UNet once a step: diffusers counts steps, not calls, and so ends an
    adapter in the middle of those of two calls a step.
    """
    one = Control(path=files.adapters[0], image=picture(50), scale=0.8)
    two = Control(path=files.adapters[1], image=picture(51).resize((96, 80)), scale=-0.6)
    grey = Control(path=files.adapters[2], image=picture(52), scale=1.3)
    is_xl = "sdxl" in files.net  # whose pipeline alone can end one early
    each: list[dict[str, Any]] = [
        {"controls": (one,), "loras": (Lora(path=files.lora),)},
        {"controls": (one, two), "guidance_scale": 1.0},
        {"controls": (replace(one, end=0.5 if is_xl else 1.0),), "sampler": "ddim"},
        {"controls": (grey,), "negative_prompt": "blue", "sampler": "euler_a"},
    ]
    return [
        Request(**{"prompt": f"a red star {n}", "seed": n, "steps": 4 + n % 2} | more)
        for n, more in enumerate(each)
    ]


def without(files: Files, picture: Picture) -> list[Request]:
    net = Control(path=files.net, image=picture(54))
    return [
        Request(prompt="a green star", seed=10, steps=5, sampler="ddim"),
        Request(prompt="a blue star", seed=11, steps=4, loras=(Lora(path=files.lora, scale=0.5),)),
        Request(prompt="a pink star", seed=12, steps=4, controls=(net,)),
        Request(prompt="a white star", seed=13, steps=6, init_image=picture(4)),
    ]


def made(engine: Engine, requests: list[Request]) -> dict[int, Result]:
    results = {result.request.seed: result for result in engine.generate(requests, True)}
    assert [result.error for result in results.values()] == [None] * len(requests)
    return results


def reference(files: Files, request: Request) -> torch.Tensor:
    """The same picture from diffusers' pipeline, as its user would write it; (3, H, W) in 0..1."""
    base, scheduler_config = reference_pipeline(files.model, *PLAIN)
    controls = request.controls
    nets = [T2IAdapter.from_pretrained(control.path) for control in controls]
    is_xl = isinstance(base, StableDiffusionXLPipeline)
    components = {name: it for name, it in base.components.items() if name != "image_encoder"}
    adapter = MultiAdapter(nets) if len(nets) > 1 else nets[0]
    pipeline: Any = ADAPTED[not is_xl](**components, adapter=adapter)
    pipeline.set_progress_bar_config(disable=True)
    sampler, options = resolve(request.sampler or scheduler_config["_class_name"], {})
    pipeline.scheduler = sampler.from_config(scheduler_config, **options)
    pictures = [
        control.image.convert("L" if net.config.in_channels == 1 else "RGB")
        for net, control in zip(nets, controls, strict=True)
    ]
    scales = [control.scale for control in controls]
    if request.loras:
        base.load_lora_weights(request.loras[0].path)
    usual = 5.0 if is_xl else 7.5
    images = pipeline(
        request.prompt,
        negative_prompt=request.negative_prompt,
        image=pictures if len(nets) > 1 else pictures[0],
        adapter_conditioning_scale=scales if len(nets) > 1 else scales[0],
        height=64,
        width=64,
        num_inference_steps=request.steps,
        guidance_scale=usual if request.guidance_scale is None else request.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(request.seed),
        output_type="pt",
        **({"adapter_conditioning_factor": controls[0].end} if is_xl else {}),
    ).images
    if request.loras:
        base.unload_lora_weights()
    # The older pipeline gives numbers as its safety checker wants them.
    return images[0] if is_xl else torch.from_numpy(images[0]).permute(2, 0, 1)


@pytest.mark.filterwarnings("ignore:The decode_latents method:FutureWarning")
@pytest.mark.parametrize("family", ["sdxl", "sd"])
def test_equals_diffusers_and_moves_no_other(
    files: dict[str, Files], family: str, picture: Picture
) -> None:
    requests, others = adapted(files[family], picture), without(files[family], picture)
    model = load_model(str(files[family].model))
    mixed = made(Engine(model, ROWS), [*requests, *others])
    for request in requests:
        expected = reference(files[family], request)
        difference = (mixed[request.seed].pixels - expected).abs().max().item()
        assert difference <= TOLERANCE, (request.seed, difference)
    bare = [replace(each, controls=()) for each in requests]
    for seed, result in made(Engine(model, ROWS), [*bare, *others]).items():
        is_moved = (mixed[seed].pixels - result.pixels).abs().max() > 0.01
        assert is_moved if seed < 10 else torch.equal(mixed[seed].pixels, result.pixels), seed


def test_what_does_not_fit_is_refused(files: dict[str, Files], picture: Picture) -> None:
    engine = Engine(load_model(str(files["sdxl"].model)), ROWS)
    control = Control(path=files["sdxl"].adapters[0], image=picture(1))
    (result,) = engine.generate([Request(prompt="a", controls=(control,), width=72, height=64)])
    assert "T2I-Adapter t2i-0 takes multiples of 16, such as 64 x 64" in str(result.error)
    xl = {"block_out_channels": (320, 640, 1280), "down_block_types": ("Down", *["CrossAttn"] * 2)}
    sd = {
        "block_out_channels": (320, 640, 1280, 1280),
        "down_block_types": (*["CrossAttn"] * 3, "Down"),
    }
    with torch.device("meta"):
        of_xl = T2IAdapter(adapter_type="full_adapter_xl", downscale_factor=16)
        of_sd = [T2IAdapter(), T2IAdapter(channels=[320, 640, 1280], adapter_type="light_adapter")]
        other = SimpleNamespace(config=SimpleNamespace(in_channels=4))
    check_fit("edges", of_xl, xl, 8)
    for net in of_sd:
        check_fit("edges", net, sd, 8)
        with pytest.raises(ValueError, match="edges is not for this model: at 1024 pixels it"):
            check_fit("edges", net, xl, 8)
    with pytest.raises(ValueError, match="pictures of 4 channels"):
        check_fit("edges", other, xl, 8)
