"""Memory of a call and of a decode, and what a decode beside the steps costs either."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.gpu import timing
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.model import call, unet_inputs
from rayjobs.diffusion.vae.latents import decode_latents

GIB = 2**30


@torch.no_grad()
def run(bench: Bench) -> Iterator[dict[str, Any]]:
    model = bench.model
    if bench.on_gpu:
        yield {"what": "weights", "gib": torch.cuda.memory_allocated() / GIB}
    for num in bench.sizes:
        inputs = unet_inputs(model, num, bench.side)
        peak = _peak_gib(bench, lambda i=inputs: call(model.unet, i))
        yield {"what": "call", "places": num, "gib": peak}
    z_1CHW = torch.randn(1, 4, bench.side, bench.side, device=bench.device, dtype=model.dtype)
    kinds = (torch.float32,) if not bench.on_gpu else (torch.bfloat16, torch.float32)
    for dtype in kinds:
        model.vae.to(dtype)
        found = timing.measure(
            lambda: decode_latents(z_1CHW, model), bench.device, repeats=bench.repeats
        )
        peak = _peak_gib(bench, lambda: decode_latents(z_1CHW, model))
        yield {"what": "decode", "dtype": str(dtype), "gib": peak} | found
    model.vae.to(model.dtype)
    yield from _beside(bench, z_1CHW)


def _beside(bench: Bench, z_1CHW: torch.Tensor) -> Iterator[dict[str, Any]]:
    """A step while another thread decodes on a stream of its own."""
    model, stop, decoded = bench.model, threading.Event(), [0]

    def decode() -> None:
        stream = torch.cuda.Stream() if bench.on_gpu else None
        while not stop.is_set():
            if stream is None:
                decode_latents(z_1CHW, model).cpu()
            else:
                with torch.no_grad(), torch.cuda.stream(stream):
                    decode_latents(z_1CHW, model).cpu()
            decoded[0] += 1

    for num in (2, max(bench.sizes)):
        inputs = unet_inputs(model, num, bench.side)
        alone = timing.queued_ms(lambda i=inputs: call(model.unet, i), bench.device, bench.repeats)
        stop.clear()
        decoded[0] = 0
        thread = threading.Thread(target=decode)
        thread.start()
        beside = timing.queued_ms(lambda i=inputs: call(model.unet, i), bench.device, bench.repeats)
        stop.set()
        thread.join()
        row = {"what": "step beside decodes", "places": num, "alone_ms": alone}
        yield row | {"beside_ms": beside, "decodes": decoded[0], "steps": bench.repeats + 1}


def _peak_gib(bench: Bench, work: Callable[[], Any]) -> float | None:
    if not bench.on_gpu:
        return None
    work()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - held) / GIB
