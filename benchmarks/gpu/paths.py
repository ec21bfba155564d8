"""The ways to call a UNet that the benchmark compares.

Owns how each is prepared. All take `(x_PCHW, t_P, arguments)` and give the prediction.
"""

import copy
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal

import torch

from benchmarks.gpu.model import call
from rayjobs.diffusion.economy.deep import whole
from rayjobs.diffusion.model import Model
from rayjobs.diffusion.modules.compiled import Compiled
from rayjobs.diffusion.modules.replay import Replay

Path = Callable[[Any], torch.Tensor]


def eager(unet: Any) -> Path:
    return lambda inputs: call(unet, inputs)


def replay(unet: Any) -> Path:
    recorded = Replay(unet)
    return lambda inputs: recorded(*inputs)


def compiled(model: Model, how: Literal["blocks", "full"]) -> Path:
    """The engine's own, compiled at its first calls."""
    made = Compiled(model.unet, model.vae, how)

    def path(inputs: Any) -> torch.Tensor:
        with nullcontext() if made.takes(whole, inputs[0], inputs[2]) else made.warming():
            predicted: torch.Tensor = made(whole, *inputs)
            return predicted

    return path


class Whole:
    """diffusers' best: compiled whole, with fused QKV and the number of places left open."""

    def __init__(self, unet: Any):
        fused = twin(unet)
        fused.fuse_qkv_projections()
        self.unet: Any = torch.compile(fused, fullgraph=True)

    def __call__(self, inputs: Any) -> torch.Tensor:
        if len(inputs[0]) > 1:
            dynamo: Any = torch._dynamo
            for tensor in tensors(inputs):
                dynamo.mark_dynamic(tensor, 0)
        return call(self.unet, inputs)


def tensors(inputs: Any) -> list[torch.Tensor]:
    """All tensors of a call, in order."""
    x_PCHW, t_P, arguments = inputs
    added = arguments["added_cond_kwargs"]
    return [x_PCHW, t_P, arguments["encoder_hidden_states"], *added.values()]


def twin(unet: Any) -> Any:
    """A second UNet on the same weights, to be compiled without changing the first."""
    memo = {id(tensor): tensor for tensor in [*unet.parameters(), *unet.buffers()]}
    return copy.deepcopy(unet, memo)


def first_call_s(path: Callable[[Any], Any], inputs: Any, device: str) -> float:
    """Seconds of a first call: compiling, recording or proving."""
    started_s = time.perf_counter()
    path(inputs)
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - started_s
