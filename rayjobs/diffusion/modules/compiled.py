"""A model's UNet and decoder, compiled by torch before the first request.

Measured on an H200, with CUDA graphs the better by 5 % at best and only in small calls: those are
not used. Owns what is compiled and when: nothing is but while a model is `warming`. Calls without
adapters only: an adapter's would have to be compiled for every rank, while the recording of the
plain UNet (`replay`) takes them as they come. Knows nothing of rows.
"""

import contextlib
import copy
import importlib
import os
import sys
import threading
from collections.abc import Callable, Generator, Mapping
from functools import partial
from typing import Any, Literal

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D

from rayjobs.diffusion.economy.deep import whole
from rayjobs.diffusion.modules.attention import use_kernel

BLOCKS = (BasicTransformerBlock, ResnetBlock2D)
BACKEND = "inductor"
MAX_GRAPHS = 512
"""Of one function, for all models of a process: torch's own limit, 8, is for mistakes."""
Way = Callable[..., Any]


def make_deterministic() -> None:
    """Keep the compiler from choosing kernels by measuring, where processes are to give the same
    bits; without importing it, which takes seconds."""
    os.environ["TORCHINDUCTOR_DETERMINISTIC"] = "1"
    if "torch._inductor.config" in sys.modules:
        config: Any = sys.modules["torch._inductor.config"]
        config.deterministic = True


class Compiled:
    """A second UNet on the weights of `unet`, which stays as it is, for adapters.

    `blocks` compiles each kind of block that it is built of, for any number of slots above one, any
    size and any length of texts, and once more for one slot. `full` compiles it whole, for any
    number of slots above one and for one, each size by itself. On a CPU 16 slots and more are apart
    from fewer: oneDNN's convolutions are. The decoder is compiled for each size, if it `decodes`.
    """

    def __init__(
        self,
        unet: Any,
        vae: Any,
        how: Literal["blocks", "full"],
        *,
        attention: str = "auto",
        decodes: bool = False,
    ):
        self.how = how
        self._unet, self._vae = unet, vae
        self._attention = attention
        self._decodes = decodes
        self._warmer: int | None = None
        self.renew()

    def renew(self) -> None:
        """Begin again on the weights that the UNet has now; what is warm is cold then."""
        self._warm: set[tuple[Any, ...]] = set()
        self._twin = twin = _twin(self._unet)
        if self.how == "blocks":
            self._call: Any = twin
            for kind in BLOCKS:
                of_kind = _Function(kind.forward, self, dynamic=True)
                for block in twin.modules():
                    if type(block) is kind:
                        block.forward = partial(of_kind, block)
        else:
            _fuse_projections(twin, self._attention)
            self._call = _Function(twin.forward, self)
        # Each size has a graph of its own: pictures of few sizes are many.
        self._decode = _Function(self._vae.decode, self, dynamic=False)

    @property
    def is_warming(self) -> bool:
        """Whether this thread may compile."""
        return self._warmer == threading.get_ident()

    @contextlib.contextmanager
    def warming(self) -> Generator[None]:
        """Within this context, this thread's calls are compiled where they were not yet."""
        dynamo: Any = torch._dynamo
        shapes: Any = importlib.import_module("torch.fx.experimental._config")
        limits = {"recompile_limit": MAX_GRAPHS, "accumulated_recompile_limit": 8 * MAX_GRAPHS}
        exact = {"automatic_dynamic_shapes": False}  # what is not said to vary is of one size
        # Two sides that are alike in this call are not so in others.
        alike = shapes.patch(use_duck_shape=self.how == "full")
        self._warmer = threading.get_ident()
        try:
            with dynamo.config.patch(**limits, **exact), alike:
                yield
        finally:
            self._warmer = None

    def takes(self, way: Way, x_PCHW: torch.Tensor, arguments: Mapping[str, Any]) -> bool:
        """Whether such calls are compiled, or may be now."""
        can = self.how == "blocks" or way is whole
        return can and self._is_known(self._kind(x_PCHW, arguments))

    def __call__(
        self, way: Way, x_PCHW: torch.Tensor, t_P: torch.Tensor, arguments: Mapping[str, Any]
    ) -> Any:
        """What the way gives, for a call that it takes."""
        x_PCHW = x_PCHW.contiguous()  # graphs are for one order of memory; samplers give any
        if self.how == "full" and self.is_warming and len(x_PCHW) > 1:
            dynamo: Any = torch._dynamo
            for tensor in (x_PCHW, t_P, *_tensors(arguments)):
                dynamo.mark_dynamic(tensor, 0)
        given = way(self._call, x_PCHW, t_P, arguments)
        if self.is_warming:
            self._warm.add(self._kind(x_PCHW, arguments))
        return given

    def takes_decoding(self, z_BCHW: torch.Tensor) -> bool:
        return self._decodes and self._is_known(("decode", *z_BCHW.shape))

    def decode(self, z_BCHW: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, H, W) of latents whose decoding it takes."""
        pixels: torch.Tensor = self._decode(z_BCHW.contiguous(), return_dict=False)[0]
        if self.is_warming:
            self._warm.add(("decode", *z_BCHW.shape))
        return pixels

    def _is_known(self, kind: tuple[Any, ...]) -> bool:
        return self.is_warming or kind in self._warm

    def _kind(self, x_PCHW: torch.Tensor, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
        """Stands for all calls that have a graph, or graphs, in common."""
        is_one = len(x_PCHW) == 1
        if self.how == "blocks":
            return "blocks", is_one
        tensors = (x_PCHW, *_tensors(arguments))
        return "full", is_one, *(tuple(tensor.shape[1:]) for tensor in tensors)


class _Function:
    """A function that is compiled while its owner is warming, and else runs as it was compiled."""

    def __init__(self, function: Callable[..., Any], owner: Compiled, **options: Any):
        dynamo: Any = torch._dynamo
        self._owner = owner
        self._compiling = torch.compile(function, backend=BACKEND, fullgraph=True, **options)
        self._running = dynamo.run(function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        function = self._compiling if self._owner.is_warming else self._running
        return function(*args, **kwargs)


def _twin(unet: Any) -> Any:
    """A second UNet on the same weights, without what adapters hooked into the first."""
    memo = {id(tensor): tensor for tensor in (*unet.parameters(), *unet.buffers())}
    twin = copy.deepcopy(unet, memo)
    for module in twin.modules():
        module._forward_hooks.clear()
    return twin


def _fuse_projections(twin: Any, attention: str) -> None:
    """One product for queries, keys and values. They take no more memory: their own weights, which
    adapters need one by one and the twins have in common, become parts of the fused ones."""
    layers = [layer for layer in twin.modules() if isinstance(layer, Attention)]
    if any((layer.to_k.bias is not None) != layer.use_bias for layer in layers):
        return  # an adapter in the weights has given one a bias, which fusing would lose
    twin.fuse_qkv_projections()
    twin.requires_grad_(False)
    use_kernel(twin, attention)
    for layer in layers:
        parts = [layer.to_k, layer.to_v]
        fused = getattr(layer, "to_kv", None)
        if fused is None:
            fused, parts = layer.to_qkv, [layer.to_q, *parts]
        sizes = [len(part.weight) for part in parts]
        for name in ("weight", "bias"):
            whole_of = getattr(fused, name)
            if whole_of is not None:
                for part, own in zip(parts, whole_of.data.split(sizes), strict=True):
                    getattr(part, name).data = own


def _tensors(arguments: Mapping[str, Any]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for value in arguments.values():
        found += _tensors(value) if isinstance(value, Mapping) else [value]
    return found
