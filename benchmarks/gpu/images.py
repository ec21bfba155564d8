"""Pictures a second: the engine, uniform and mixed, against diffusers' documented best."""

import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline

from benchmarks.gpu import paths
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.model import scheduler
from rayjobs.diffusion.engine import Engine
from rayjobs.diffusion.request import Request

BATCH = 8
MIX = ("euler", "ddim", "dpmpp_2m", "heun", "euler_a", "unipc")


def run(bench: Bench) -> Iterator[dict[str, Any]]:
    steps = (2, 3) if bench.small else (20, 30)
    num = BATCH if bench.small else 2 * BATCH
    for n in steps:
        yield _engine(bench, f"uniform, {n} steps", [_request(i, "euler", n) for i in range(num)])
    drawn = random.Random(0)
    spread = (2, 3) if bench.small else (10, 15, 20, 25, 30)
    mixed = [_request(i, MIX[i % len(MIX)], drawn.choice(spread)) for i in range(2 * num)]
    yield _engine(bench, "mixed", mixed)
    yield from _diffusers(bench, steps, num)


def _request(seed: int, sampler: str, steps: int) -> Request:
    return Request(
        prompt=f"a photo of a red star number {seed}",
        seed=seed,
        sampler=sampler,
        steps=steps,
        guidance_scale=5.0,
    )


def _engine(bench: Bench, work: str, requests: list[Request]) -> dict[str, Any]:
    def make() -> int:
        engine = Engine(bench.model, max_rows=BATCH)
        calls = 0
        for request in requests:
            row = engine.add(request)
            calls += engine.progress(row)[1]
        while engine.num_pending:
            for result in engine.step():
                assert result.image is not None, result.error
        return calls

    warm_up = Engine(bench.model, max_rows=BATCH)
    list(warm_up.generate([_request(0, "euler", 2)] * BATCH))
    seconds, calls = _timed(bench, make)
    row = {"side": "engine", "work": work, "images": len(requests), "seconds": seconds}
    return row | {"images_per_s": len(requests) / seconds, "row_steps_per_s": calls / seconds}


def _diffusers(bench: Bench, steps: tuple[int, ...], num: int) -> Iterator[dict[str, Any]]:
    """As its guide to fast inference says: bfloat16, channels last, fused QKV, both compiled."""
    model = bench.model
    vae: Any = model.vae
    make_pipeline: Any = StableDiffusionXLPipeline
    pipeline = make_pipeline(
        vae=vae,
        text_encoder=model.text_encoders[0],
        text_encoder_2=model.text_encoders[1],
        tokenizer=model.tokenizers[0],
        tokenizer_2=model.tokenizers[1],
        unet=model.unet,
        scheduler=scheduler(),
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    plain = vae.decode
    for compiled in (False, True):
        if compiled:
            whole: Any = paths.Whole(model.unet)
            pipeline.unet = whole.unet
            vae.decode = torch.compile(vae.decode, fullgraph=True)
        for n in steps:

            def make(n: int = n) -> int:
                for first in range(0, num, BATCH):
                    generators = [
                        torch.Generator("cpu").manual_seed(first + i) for i in range(BATCH)
                    ]
                    pipeline(
                        [f"a photo of a red star number {first + i}" for i in range(BATCH)],
                        num_inference_steps=n,
                        guidance_scale=5.0,
                        generator=generators,
                        height=8 * bench.side,
                        width=8 * bench.side,
                    )
                return num * n

            if n == steps[0]:
                make(2)
            seconds, calls = _timed(bench, make)
            yield {
                "side": "diffusers, compiled" if compiled else "diffusers",
                "work": f"uniform, {n} steps",
                "images": num,
                "seconds": seconds,
                "images_per_s": num / seconds,
                "row_steps_per_s": calls / seconds,
            }
    vae.decode = plain


def _timed(bench: Bench, make: Callable[[], int]) -> tuple[float, int]:
    bench.synchronize()
    started_s = time.perf_counter()
    calls = make()
    bench.synchronize()
    return time.perf_counter() - started_s, calls
