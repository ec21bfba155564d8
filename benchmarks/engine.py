"""The engine against diffusers' own pipeline: same components, dtype, threads and batch, one run.

`python -m benchmarks.engine [--model starter] [--rounds 3]` prints a table of images per second and
their ratio, and writes benchmarks/engine.json. Rounds alternate between the two, and the ratio is
of medians, for machines are noisy. Uniform work gives both the same batches; the mix is one request
of every sampler, step count and guidance, which diffusers can only batch where all three agree.
"""

import argparse
import itertools
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline

from rayjobs.diffusion.engine import Engine
from rayjobs.diffusion.model import Model, ModelOptions, load_model
from rayjobs.diffusion.request import Request
from rayjobs.diffusion.sampler import resolve
from rayjobs.diffusion.weights import locate

SAMPLERS = ("euler", "ddim", "dpmpp_2m", "heun", "euler_a", "unipc")
STEPS = (8, 12, 20, 30)
GUIDANCE = (1.0, 3.0, 5.0, 7.5)
NUM_UNIFORM = 32


def uniform_requests(batch: int) -> list[Request]:
    return [_request(n, "euler", 20, 5.0) for n in range(-(-NUM_UNIFORM // batch) * batch)]


def mixed_requests() -> list[Request]:
    """One request of each combination, in a fixed random order."""
    combinations = list(itertools.product(SAMPLERS, STEPS, GUIDANCE))
    random.Random(0).shuffle(combinations)
    return [_request(n, *combination) for n, combination in enumerate(combinations)]


def _request(number: int, sampler: str, steps: int, guidance: float) -> Request:
    return Request(
        prompt=f"a photo of a red star number {number} on a blue background",
        seed=number,
        sampler=sampler,
        steps=steps,
        guidance_scale=guidance,
    )


def run_engine(model: Model, requests: list[Request], batch: int, fixed_shape: bool) -> None:
    engine = Engine(model, max_rows=batch, fixed_shape=fixed_shape)
    results = list(engine.generate(requests))
    assert all(result.image is not None for result in results)


def run_diffusers(pipeline: Any, requests: list[Request], batch: int) -> None:
    """diffusers' best: requests that agree in sampler, steps and guidance share its batches."""
    groups: dict[tuple[Any, ...], list[Request]] = {}
    for request in requests:
        key = (request.sampler, request.steps, request.guidance_scale)
        groups.setdefault(key, []).append(request)
    own = pipeline.scheduler.config
    for (sampler, steps, guidance), group in groups.items():
        sampler_class, options = resolve(sampler, {})
        pipeline.scheduler = sampler_class.from_config(own, **options)
        for first in range(0, len(group), batch):
            chunk = group[first : first + batch]
            pipeline(
                [request.prompt for request in chunk],
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=[torch.Generator("cpu").manual_seed(r.seed) for r in chunk],
            )


def load_pipeline(model: Model) -> Any:
    """The same weights in diffusers' pipeline, as its documentation loads it."""
    folder = locate(model.uri).path
    pipeline: Any = StableDiffusionXLPipeline.from_pretrained(
        folder, dtype=model.dtype, use_safetensors=True, add_watermarker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(model.device)


def compare(work: Callable[[], None], reference: Callable[[], None], rounds: int) -> list[float]:
    """Median seconds of both, timed by turns after one untimed round each."""
    times: list[list[float]] = [[], []]
    for round_number in range(rounds + 1):
        for side, call in enumerate((work, reference)):
            started = time.perf_counter()
            call()
            if round_number:
                times[side].append(time.perf_counter() - started)
    return [statistics.median(side) for side in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="starter")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = load_model(args.model, ModelOptions(dtype=args.dtype, device=args.device))
    pipeline = load_pipeline(model)
    works = [
        ("uniform, fixed shape", uniform_requests(args.batch), True),
        ("mix, fixed shape", mixed_requests(), True),
        ("mix, shape as needed", mixed_requests(), False),
    ]
    table = []
    print(f"{'work':24}{'images':>8}{'engine/s':>10}{'diffusers/s':>13}{'ratio':>8}")
    for name, requests, fixed_shape in works:
        ours, theirs = compare(
            lambda r=requests, f=fixed_shape: run_engine(model, r, args.batch, f),
            lambda r=requests: run_diffusers(pipeline, r, args.batch),
            args.rounds,
        )
        num = len(requests)
        row = {"work": name, "images": num, "engine_s": ours, "diffusers_s": theirs}
        table.append(row | {"ratio": theirs / ours})
        print(f"{name:24}{num:8}{num / ours:10.2f}{num / theirs:13.2f}{theirs / ours:8.2f}")
    out = Path(__file__).with_suffix(".json")
    facts = {**vars(args), "torch": torch.__version__, "device": model.device}
    out.write_text(json.dumps({"settings": facts, "results": table}, indent=2) + "\n")


if __name__ == "__main__":
    main()
