"""Seconds of a UNet call, by number of places and by the way it is called."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu import paths, timing
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.model import call, unet_inputs
from rayjobs.diffusion.modules.attention import KERNELS, use_kernel


@torch.no_grad()
def run(bench: Bench) -> Iterator[dict[str, Any]]:
    unet = bench.model.unet
    rate = timing.matmul_tflops(bench.device, 256 if bench.small else 8192)
    with FlopCounterMode(display=False) as counter:
        call(unet, unet_inputs(bench.model, 1, bench.side))
    flops = counter.get_total_flops()
    yield {"matmul_tflops": rate, "gflop_per_place": flops / 1e9}
    for way in bench.ways:
        yield from _by_size(bench, way, flops / rate / 1e9)
    yield from attention(bench)


def _by_size(bench: Bench, way: str, floor_ms: float) -> Iterator[dict[str, Any]]:
    path = bench.way(way)
    for num in sorted(bench.sizes, reverse=True):
        if way == "whole" and num == 1:
            continue  # a graph of its own: another compile for calls of one place
        inputs = unet_inputs(bench.model, num, bench.side)
        first_s = paths.first_call_s(path, inputs, bench.device)
        found = timing.measure(lambda i=inputs: path(i), bench.device, repeats=bench.repeats)
        queued = timing.queued_ms(lambda i=inputs: path(i), bench.device, bench.repeats)
        yield (
            {"way": way, "places": num, "first_s": first_s, "queued_ms": queued}
            | found
            | {"share_of_matmul": floor_ms * num / queued}
        )


def attention(bench: Bench) -> Iterator[dict[str, Any]]:
    """Torch's attention kernels under plain calls, and the layout of memory."""
    inputs = unet_inputs(bench.model, 4, bench.side)
    unet = bench.model.unet
    for name in ("auto", *KERNELS) if bench.on_gpu else ("auto", "math"):
        own = paths.twin(unet)
        use_kernel(own, name)
        queued = timing.queued_ms(lambda own=own: call(own, inputs), bench.device, bench.repeats)
        yield {"attention": name, "places": 4, "queued_ms": queued}
    unet.to(memory_format=torch.channels_last)
    queued = timing.queued_ms(lambda: call(unet, inputs), bench.device, bench.repeats)
    unet.to(memory_format=torch.contiguous_format)
    yield {"layout": "channels last", "places": 4, "queued_ms": queued}
