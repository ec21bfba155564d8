"""Which layers of the UNet give a row other bits in another place of the same call, and why.

Owns the probe: every leaf module, and torch's attention, is run a second time on the same rows
turned round by one row (two places), and the two outputs are compared row by row.
"""

import contextlib
from collections import Counter
from collections.abc import Generator, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.model import call, take, unet_inputs


@torch.no_grad()
def run(bench: Bench) -> Iterator[dict[str, Any]]:
    sizes = [p for p in bench.sizes if p >= 4]
    settings = SETTINGS if bench.on_gpu else {"as it is": contextlib.nullcontext}
    for name, setting in settings.items():
        with setting():
            for num in sizes:
                yield {"setting": name, "places": num, "end to end": _end_to_end(bench, num)}
    for name in ("as it is", "no split-K") if bench.on_gpu else ("as it is",):
        with settings[name]():
            for num in sizes:
                yield {"setting": name, "places": num, "layers": _by_layer(bench, num)}


def _end_to_end(bench: Bench, num: int) -> int | str:
    """How many of a row's possible places give other bits than its first."""
    inputs = unet_inputs(bench.model, num, bench.side)
    places = list(range(num))
    try:
        first = call(bench.model.unet, inputs)[:2].clone()
        varying = 0
        for shift in range(2, num, 2):
            turned = take(inputs, places[-shift:] + places[:-shift])
            there = call(bench.model.unet, turned)[shift : shift + 2]
            varying += not torch.equal(there, first)
    except RuntimeError as error:
        return str(error).split("\n")[0]
    return varying


def _by_layer(bench: Bench, num: int) -> dict[str, list[int]]:
    """By kind and shape of layer: calls whose rows moved with their places, and all calls."""
    unet, seen, varying = bench.model.unet, Counter[str](), Counter[str]()

    def compare(kind: str, function: Any, *args: Any) -> None:
        key = f"{kind} {' '.join(str(tuple(a.shape)) for a in args if a is not None)}"
        seen[key] += 1
        plain = function(*args)
        turned = function(*(None if a is None else a.roll(2, 0) for a in args))
        varying[key] += not torch.equal(turned, plain.roll(2, 0))

    def hook(module: Any, args: Any, output: Any) -> None:
        if args and isinstance(args[0], torch.Tensor) and len(args[0]) == num:
            weight = getattr(module, "weight", None)
            kind = type(module).__name__ + ("" if weight is None else f"{tuple(weight.shape)}")
            compare(kind, module.forward, args[0])

    leaves = [m for m in unet.modules() if not list(m.children())]
    handles = [leaf.register_forward_hook(hook) for leaf in leaves]
    functional: Any = F
    attention = functional.scaled_dot_product_attention

    def probed(query: Any, key: Any, value: Any, **rest: Any) -> Any:
        compare("attention", lambda *a: attention(*a, **rest), query, key, value)
        return attention(query, key, value, **rest)

    functional.scaled_dot_product_attention = probed
    try:
        call(unet, unet_inputs(bench.model, num, bench.side))
    finally:
        functional.scaled_dot_product_attention = attention
        for handle in handles:
            handle.remove()
    return {key: [count, seen[key]] for key, count in varying.items() if count}


@contextlib.contextmanager
def _no_split_k() -> Generator[None]:
    matmul: Any = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    try:
        matmul.allow_bf16_reduced_precision_reduction = (False, False)
    except (TypeError, ValueError, RuntimeError):
        matmul.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        matmul.allow_bf16_reduced_precision_reduction = before


@contextlib.contextmanager
def _cublas() -> Generator[None]:
    """The other of torch's two libraries of matrix products."""
    torch.backends.cuda.preferred_blas_library("cublas")
    try:
        yield
    finally:
        torch.backends.cuda.preferred_blas_library("default")


@contextlib.contextmanager
def _cublaslt() -> Generator[None]:
    torch.backends.cuda.preferred_blas_library("cublaslt")
    try:
        yield
    finally:
        torch.backends.cuda.preferred_blas_library("default")


@contextlib.contextmanager
def _cudnn_deterministic() -> Generator[None]:
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = False


@contextlib.contextmanager
def _no_cudnn() -> Generator[None]:
    with torch.backends.cudnn.flags(enabled=False):
        yield


@contextlib.contextmanager
def _all() -> Generator[None]:
    with _no_split_k(), _cudnn_deterministic(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        yield


SETTINGS: dict[str, Any] = {
    "as it is": contextlib.nullcontext,
    "no split-K": _no_split_k,
    "cublas": _cublas,
    "cublaslt": _cublaslt,
    "cudnn deterministic": _cudnn_deterministic,
    "flash": lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION),
    "math": lambda: sdpa_kernel(SDPBackend.MATH),
    "no split-K, cudnn deterministic, flash": _all,
    "no cudnn": _no_cudnn,
}
