"""Milliseconds of decoding a picture, by layout of memory and way to call."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.gpu import paths, timing
from benchmarks.gpu.bench import Bench
from rayjobs.diffusion.vae.latents import decode_latents, to_image


@torch.no_grad()
def run(bench: Bench) -> Iterator[dict[str, Any]]:
    model, vae = bench.model, bench.model.vae
    z_1CHW = torch.randn(1, 4, bench.side, bench.side, device=bench.device, dtype=model.dtype)

    def decode() -> torch.Tensor:
        picture: torch.Tensor = vae.decode(z_1CHW, return_dict=False)[0]
        return picture

    def row(what: str, work: Callable[[], Any]) -> dict[str, Any]:
        found = timing.measure(work, bench.device, repeats=bench.repeats)
        return {"what": what, "queued_ms": timing.queued_ms(work, bench.device)} | found

    yield row("to the host, as the engine does", lambda: to_image(decode_latents(z_1CHW, model)[0]))
    yield row("contiguous", decode)
    vae.to(memory_format=torch.channels_last)
    yield row("channels last", decode)
    vae.to(memory_format=torch.contiguous_format)
    torch.backends.cudnn.benchmark = True
    yield row("contiguous, cudnn chooses by trial", decode)
    vae.to(memory_format=torch.channels_last)
    yield row("channels last, cudnn chooses by trial", decode)
    torch.backends.cudnn.benchmark = False
    if bench.on_gpu:
        compiled = torch.compile(paths.twin(vae).decode, fullgraph=True)
        work = lambda: compiled(z_1CHW, return_dict=False)[0]  # noqa: E731
        first_s = paths.first_call_s(lambda _: work(), None, bench.device)
        yield row("compiled, channels last", work) | {"first_s": first_s}
    picture = decode()

    def to_bytes() -> torch.Tensor:
        pixels = (picture.float() / 2 + 0.5).clamp(0, 1) * 255
        return pixels.round().to(torch.uint8).cpu()

    yield row("picture to the host as float32", lambda: picture.float().cpu())
    yield row("picture to the host as bytes", to_bytes)
