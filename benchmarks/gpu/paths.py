"""The ways to call a UNet that the benchmark compares.

Owns how each is prepared. All take `(x_PCHW, t_P, arguments)` and give the prediction.
"""

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D

from benchmarks.gpu.model import call
from rayjobs.diffusion.modules.replay import Replay

Path = Callable[[Any], torch.Tensor]


def eager(unet: Any) -> Path:
    return lambda inputs: call(unet, inputs)


def replay(unet: Any) -> Path:
    recorded = Replay(unet)
    return lambda inputs: recorded(*inputs)


def blocks(unet: Any, kinds: tuple[type, ...] = (BasicTransformerBlock,)) -> Path:
    """The repeated blocks compiled, each kind once for all numbers of places above one."""
    compiled = twin(unet)
    for module in compiled.modules():
        if isinstance(module, kinds):
            module.compile(dynamic=True)
    return lambda inputs: call(compiled, inputs)


def more_blocks(unet: Any) -> Path:
    return blocks(unet, (BasicTransformerBlock, ResnetBlock2D))


class Whole:
    """The whole UNet compiled at once, with fused QKV and the number of places left open."""

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


class Graphs:
    """Any of the paths, recorded as one CUDA graph for each number of places."""

    def __init__(self, path: Path):
        self.path = path
        self.recorded: dict[tuple[int, ...], tuple[Any, Any, torch.Tensor]] = {}

    def __call__(self, inputs: Any) -> torch.Tensor:
        shape = tuple(inputs[0].shape)
        if shape not in self.recorded:
            self.recorded[shape] = self._record(inputs)
        graph, mine, output = self.recorded[shape]
        for to, new in zip(tensors(mine), tensors(inputs), strict=True):
            to.copy_(new)
        graph.replay()
        return output

    def _record(self, inputs: Any) -> tuple[Any, Any, torch.Tensor]:
        mine = map_tensors(inputs)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.path(mine)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = self.path(mine)
        return graph, mine, output


def tensors(inputs: Any) -> list[torch.Tensor]:
    """All tensors of a call, in order."""
    x_PCHW, t_P, arguments = inputs
    added = arguments["added_cond_kwargs"]
    return [x_PCHW, t_P, arguments["encoder_hidden_states"], *added.values()]


def map_tensors(inputs: Any) -> Any:
    """The same call on tensors of its own."""
    x_PCHW, t_P, arguments = inputs
    added = {name: value.clone() for name, value in arguments["added_cond_kwargs"].items()}
    text = arguments["encoder_hidden_states"].clone()
    own = {"encoder_hidden_states": text, "added_cond_kwargs": added}
    return x_PCHW.clone(), t_P.clone(), own


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
