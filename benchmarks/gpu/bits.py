"""Which calls give the same bits: places, sizes of a call, ways to call, kernels, devices.

Owns the comparisons that the engine's promises rest on.
"""

import threading
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu import paths
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.model import call, take, unet_inputs
from rayjobs.diffusion.modules.attention import use_kernel
from rayjobs.diffusion.vae.latents import decode_latents


def difference(a: torch.Tensor, b: torch.Tensor) -> dict[str, Any]:
    """Whether they are equal, and the largest difference relative to the largest value."""
    gap = (a.float() - b.float()).abs().max() / b.float().abs().max()
    return {"same": bool(torch.equal(a, b)), "relative": float(gap)}


@torch.no_grad()
def run(bench: Bench) -> Iterator[dict[str, Any]]:
    yield from places(bench)
    yield from ways(bench)
    yield flash_beside_decode(bench)


def places(bench: Bench) -> Iterator[dict[str, Any]]:
    """A row (two places) alone, in calls of other sizes, and in other places of one size."""
    unet, sizes = bench.model.unet, [p for p in bench.sizes if p > 1]
    inputs = unet_inputs(bench.model, max(sizes), bench.side)
    first = call(unet, take(inputs, [0, 1]))
    again = call(unet, take(inputs, [0, 1]))
    yield {"what": "the same call twice"} | difference(first, again)
    for num in sizes:
        rest = list(range(2, num))
        front = call(unet, take(inputs, [0, 1, *rest]))[:2]
        back = call(unet, take(inputs, [*rest, 0, 1]))[-2:]
        turned = call(unet, take(inputs, [0, 1, *reversed(rest)]))[:2]
        yield {"what": "against alone", "places": num} | difference(front, first)
        yield {"what": "last places against first", "places": num} | difference(back, front)
        yield {"what": "other neighbours", "places": num} | difference(turned, front)


def ways(bench: Bench) -> Iterator[dict[str, Any]]:
    """Every way to call against plain Python."""
    inputs = unet_inputs(bench.model, 4, bench.side)
    plain = call(bench.model.unet, inputs).clone()
    for name in bench.ways:
        path = bench.way(name)
        path(inputs)
        first = path(inputs).clone()
        found = {"what": "against eager", "way": name} | difference(first, plain)
        yield found | {"repeats": bool(torch.equal(path(inputs), first))}


def flash_beside_decode(bench: Bench) -> dict[str, Any]:
    """UNet calls under `attention: flash` while another thread decodes."""
    model, failures, stop = bench.model, [], threading.Event()
    z_1CHW = torch.randn(1, 4, bench.side, bench.side, device=bench.device, dtype=model.vae.dtype)

    def decode() -> None:
        while not stop.is_set():
            try:
                decode_latents(z_1CHW, model).cpu()  # waits for it
            except RuntimeError as error:
                failures.append(str(error).split("\n")[0])
                return

    unet = paths.twin(model.unet)
    use_kernel(unet, "flash")
    thread = threading.Thread(target=decode)
    thread.start()
    inputs = unet_inputs(model, 2, bench.side)
    for _ in range(bench.repeats):
        call(unet, inputs)
        bench.synchronize()
    stop.set()
    thread.join()
    return {"what": "decode while the UNet is held to flash", "failures": failures}
