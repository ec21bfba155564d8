"""Linear layers of a CPU model on oneDNN.

torch sends float32 matrix products on a CPU to MKL, which takes twice oneDNN's time for them on an
AMD Zen 5 and, for small ones, two thirds of it on Intel's own processors (measured). Owns that
choice, for inference only: the operator has no gradient.
"""

import warnings
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch


def use_for_linear(module: torch.nn.Module) -> None:
    """Send every float32 Linear in `module` to oneDNN, where this build of torch has it."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return
    for layer in module.modules():
        if type(layer) is torch.nn.Linear and layer.weight.dtype == torch.float32:
            layer.forward = partial(_linear, layer)


@cache
def cpu_vendor() -> str:
    """The processor's maker, by which MKL and oneDNN choose their kernels."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "CPU"
    return next((line.split(":")[1].strip() for line in lines if "vendor_id" in line), "CPU")


def is_faster() -> bool:
    """Whether oneDNN's linear layers are faster than MKL's on this processor."""
    return cpu_vendor() != "GenuineIntel"


def _linear(layer: torch.nn.Linear, input: torch.Tensor) -> torch.Tensor:
    product: torch.Tensor = _operator()(input, layer.weight, layer.bias)
    return product


@cache
def _operator() -> Any:
    """The operator as a script: torch's tracer cannot take its list of scalars from Python."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(_linear_pointwise)


def _linear_pointwise(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
    return product
