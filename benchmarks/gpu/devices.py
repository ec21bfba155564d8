"""The starter's pictures made on a CPU and on the device, both in float32, for every sampler."""

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu.bench import Bench
from rayjobs.diffusion.engine import Engine
from rayjobs.diffusion.model import ModelOptions, load_model
from rayjobs.diffusion.request import Request, Result
from rayjobs.diffusion.sampler_names import EDM, SAMPLERS


def run(bench: Bench) -> Iterator[dict[str, Any]]:
    names = [name for name, (kind, _) in SAMPLERS.items() if kind not in EDM]
    names = names[:3] if bench.small else names
    here = _pictures("cpu", names)
    there = _pictures(bench.device, names)
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    exact = _pictures(bench.device, names)
    torch.backends.cudnn.allow_tf32 = allowed
    for name in names:
        yield {
            "sampler": name,
            "as it is": _levels(here[name], there[name]),
            "without TF32": _levels(here[name], exact[name]),
        }


def _pictures(device: str, names: list[str]) -> dict[str, Result]:
    options = ModelOptions(device=device, dtype="float32", onednn=False)
    engine, made = Engine(load_model("starter", options), max_rows=1), {}
    for name in names:
        request = Request(prompt="a photo of a red star", sampler=name, steps=8, seed=7)
        (made[name],) = engine.generate([request], keep_pixels=True)
    return made


def _levels(here: Result, there: Result) -> float | str | None:
    """The largest difference of two pictures, in 8-bit levels."""
    if here.pixels is None or there.pixels is None:
        return here.error or there.error
    return float(255 * (here.pixels - there.pixels).abs().max())
