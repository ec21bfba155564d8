"""What ControlNets cost on this machine: eight requests of which some have one, in one batch.

`python -m benchmarks.control [--model starter] [--rounds 3]` prints CPU seconds of eight requests,
of which none, one, four and eight have a ControlNet (of random weights, as large as the model's own
would be), with calls of a fixed shape as a job has them, and as large as needed as in serving; and
of diffusers' pipelines, one request after the other: a picture of each kind is timed there, and
their sums are told. Rounds alternate, and figures are medians. Writes benchmarks/control.json.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
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

from rayjobs.diffusion.engine import Engine
from rayjobs.diffusion.model import Model, ModelOptions, load_model
from rayjobs.diffusion.request import Control, Request
from rayjobs.diffusion.weights import Source, locate

ROWS = 8
WITH_CONTROL = (0, 1, 4, 8)
SPREAD = 0.02
PROMPT = "a photo of a red star"
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


def run(model: Model, control: Control, number: int, *, fixed_shape: bool, steps: int) -> float:
    """CPU seconds of eight requests, the first `number` of them with the control."""
    engine = Engine(model, max_rows=ROWS, fixed_shape=fixed_shape)
    engine.controls.load(control.path)
    requests = [
        Request(
            prompt=PROMPT,
            seed=seed,
            steps=steps,
            guidance_scale=5.0,
            controls=(control,) if seed < number else (),
        )
        for seed in range(ROWS)
    ]
    started_s = time.process_time()
    results = list(engine.generate(requests))
    seconds = time.process_time() - started_s
    assert all(result.image is not None for result in results), results[0].error
    return seconds


def run_diffusers(pipeline: Any, control: Control | None, steps: int, side: int) -> float:
    """CPU seconds of one picture."""
    image = {} if control is None else {"image": control.image}
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
    for pipeline in (plain, controlled):
        pipeline.set_progress_bar_config(disable=True)
    seconds: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds + 1):  # the first of which records the networks
        for number in WITH_CONTROL:
            for shape in (True, False):
                taken = run(model, control, number, fixed_shape=shape, steps=steps)
                seconds[f"{'fixed' if shape else 'free'} {number}"].append(taken)
        seconds["diffusers plain"].append(run_diffusers(plain, None, steps, side))
        seconds["diffusers control"].append(run_diffusers(controlled, control, steps, side))
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
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = load_model(args.model, ModelOptions(device="cpu"))
    with tempfile.TemporaryDirectory() as folder:
        seconds = measure(model, write_controlnet(model, folder), args.steps, args.rounds)
    print("\n".join(table(seconds)))
    values = {"model": args.model, "threads": args.threads, "steps": args.steps, "rows": ROWS}
    Path("benchmarks/control.json").write_text(json.dumps(values | seconds, indent=1) + "\n")


if __name__ == "__main__":
    main()
