"""What ControlNets cost on this machine: eight requests of which some have one, in one batch.

`python -m benchmarks.control [--model starter] [--rounds 3]` prints CPU seconds of eight requests,
of which none, one, four and eight have a ControlNet (of random weights, as large as the model's own
would be), with calls of a fixed shape as a job has them, and as large as needed as in serving; and
of diffusers' pipelines, one request after the other: a picture of each kind is timed there, and
their sums are told. Rounds alternate, and figures are medians. Writes benchmarks/control.json.

With --ip-adapter they have an IP-Adapter instead, each with a picture of its own, of a kind that
makes four tokens of one; its image encoder is as small as the starter model.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from rayjobs.diffusion.engine import Engine
from rayjobs.diffusion.ip_adapter.files import cross_attentions, layer_names
from rayjobs.diffusion.model import Model, ModelOptions, load_model
from rayjobs.diffusion.request import Control, IpAdapter, Request
from rayjobs.diffusion.weights import Source, locate

ROWS = 8
WITH_CONTROL = (0, 1, 4, 8)
SPREAD = 0.02
PROMPT = "a photo of a red star"
More = Callable[[int], dict[str, Any]]
"""What a request of this seed has beside the others."""
PIPELINES: dict[str, tuple[Any, Any]] = {
    "sdxl": (StableDiffusionXLPipeline, StableDiffusionXLControlNetPipeline),
    "sd": (StableDiffusionPipeline, StableDiffusionControlNetPipeline),
}


def write_controlnet(model: Model, folder: str) -> str:
    """A ControlNet with the model's own encoder, whose last layers are not zeros."""
    torch.manual_seed(0)
    widths = (16, 32, 96, 256)[: model.vae_scale.bit_length()]
    net = ControlNetModel.from_unet(model.unet, conditioning_embedding_out_channels=widths)
    for layer in (*net.controlnet_down_blocks, net.controlnet_mid_block):
        torch.nn.init.normal_(layer.weight, std=SPREAD)
    net.save_pretrained(folder)
    return folder


def write_ip_adapter(model: Model, folder: Path) -> tuple[str, str]:
    """An IP-Adapter for the model and its image encoder, both random."""
    torch.manual_seed(0)
    width, embedded = model.unet.config.cross_attention_dim, 192
    config = CLIPVisionConfig(
        hidden_size=192, intermediate_size=768, projection_dim=embedded, num_hidden_layers=6,
        num_attention_heads=6, patch_size=32,
    )  # fmt: skip
    CLIPVisionModelWithProjection(config).save_pretrained(folder / "encoder")
    tensors = {
        "image_proj.proj.weight": torch.randn(4 * width, embedded),
        "image_proj.proj.bias": torch.zeros(4 * width),
        "image_proj.norm.weight": torch.ones(width),
        "image_proj.norm.bias": torch.zeros(width),
    }
    for number, layer in enumerate(cross_attentions(model.unet)):
        for name in layer_names(number):
            tensors[name] = torch.randn(layer.to_k.weight.shape) * SPREAD
    save_file(tensors, folder / "adapter.safetensors")
    return str(folder / "adapter.safetensors"), str(folder / "encoder")


def with_control(control: Control, seed: int) -> dict[str, Any]:
    return {"controls": (control,)}


def with_reference(pair: tuple[str, str], seed: int) -> dict[str, Any]:
    picture = Image.radial_gradient("L").convert("RGB").rotate(seed)
    return {"ip_adapters": (IpAdapter(path=pair[0], encoder=pair[1], image=picture),)}


def run(model: Model, more: More, number: int, *, fixed_shape: bool, steps: int) -> float:
    """CPU seconds of eight requests, the first `number` of them with something more."""
    engine = Engine(model, max_rows=ROWS, fixed_shape=fixed_shape)
    for use in more(0).get("controls", ()):
        engine.controls.load(use.path)
    for use in more(0).get("ip_adapters", ()):
        engine.ip_adapters.load(use.path, use.encoder)
    requests = [
        Request(
            prompt=PROMPT,
            seed=seed,
            steps=steps,
            guidance_scale=5.0,
            **(more(seed) if seed < number else {}),
        )
        for seed in range(ROWS)
    ]
    started_s = time.process_time()
    results = list(engine.generate(requests))
    seconds = time.process_time() - started_s
    assert all(result.image is not None for result in results), results[0].error
    return seconds


def run_diffusers(pipeline: Any, steps: int, side: int, **image: Any) -> float:
    """CPU seconds of one picture."""
    started_s = time.process_time()
    pipeline(
        PROMPT,
        num_inference_steps=steps,
        guidance_scale=5.0,
        height=side,
        width=side,
        generator=torch.Generator("cpu").manual_seed(0),
        **image,
    )
    return time.process_time() - started_s


def measure(model: Model, folder: str, steps: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each round, by what was made."""
    side = model.default_side
    control = Control(path=folder, image=Image.radial_gradient("L").resize((side, side)))
    plain_class, control_class = PIPELINES[model.family]
    plain = plain_class.from_pretrained(locate(Source(uri=model.uri)).path, dtype=torch.float32)
    net = ControlNetModel.from_pretrained(folder)
    controlled = control_class(**plain.components, controlnet=net)
    image = {"image": control.image}
    return _rounds(model, partial(with_control, control), (plain, controlled), image, steps, rounds)


def measure_references(
    model: Model, folder: str, steps: int, rounds: int
) -> dict[str, list[float]]:
    """The same of IP-Adapters."""
    pair = write_ip_adapter(model, Path(folder))
    plain, referring = (
        PIPELINES[model.family][0].from_pretrained(
            locate(Source(uri=model.uri)).path, dtype=torch.float32
        )
        for _ in range(2)
    )
    referring.load_ip_adapter(
        folder, subfolder="", weight_name=Path(pair[0]).name, image_encoder_folder="encoder"
    )
    more = partial(with_reference, pair)
    image = {"ip_adapter_image": more(0)["ip_adapters"][0].image}
    return _rounds(model, more, (plain, referring), image, steps, rounds)


def _rounds(
    model: Model, more: More, pipelines: tuple[Any, Any], image: Any, steps: int, rounds: int
) -> dict[str, list[float]]:
    side = model.default_side
    plain, other = pipelines
    for pipeline in pipelines:
        pipeline.set_progress_bar_config(disable=True)
    seconds: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds + 1):  # the first of which records the networks
        for number in WITH_CONTROL:
            for shape in (True, False):
                taken = run(model, more, number, fixed_shape=shape, steps=steps)
                seconds[f"{'fixed' if shape else 'free'} {number}"].append(taken)
        seconds["diffusers plain"].append(run_diffusers(plain, steps, side))
        seconds["diffusers control"].append(run_diffusers(other, steps, side, **image))
    return {name: each[1:] for name, each in seconds.items()}


def table(seconds: dict[str, list[float]]) -> list[str]:
    median = {name: statistics.median(each) for name, each in seconds.items()}
    plain, control = median["diffusers plain"], median["diffusers control"]
    lines = ["rows with one | fixed shape | as large as needed | diffusers, one by one"]
    for number in WITH_CONTROL:
        fixed, free = median[f"fixed {number}"], median[f"free {number}"]
        alone = number * control + (ROWS - number) * plain
        lines.append(
            f"{number:13} | {fixed:5.2f} s {fixed / median['fixed 0']:.2f} "
            f"| {free:9.2f} s {free / median['free 0']:.2f} "
            f"| {alone:8.2f} s {alone / (ROWS * plain):.2f}"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="starter")
    parser.add_argument("--ip-adapter", action="store_true")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = load_model(args.model, ModelOptions(device="cpu"))
    with tempfile.TemporaryDirectory() as folder:
        if args.ip_adapter:
            seconds = measure_references(model, folder, args.steps, args.rounds)
        else:
            seconds = measure(model, write_controlnet(model, folder), args.steps, args.rounds)
    print("\n".join(table(seconds)))
    values = {"model": args.model, "threads": args.threads, "steps": args.steps, "rows": ROWS}
    name = "ip_adapter" if args.ip_adapter else "control"
    Path(f"benchmarks/{name}.json").write_text(json.dumps(values | seconds, indent=1) + "\n")


if __name__ == "__main__":
    main()
