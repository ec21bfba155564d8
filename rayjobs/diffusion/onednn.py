"""Linear layers of a CPU model on oneDNN.

torch sends float32 matrix products on a CPU to MKL, which takes twice oneDNN's time for them on an
AMD Zen 5 (measured). Owns that choice, for inference only: the operator has no gradient.
"""

from functools import partial

import torch


def use_for_linear(module: torch.nn.Module) -> None:
    """Send every float32 Linear in `module` to oneDNN, where this build of torch has it."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return
    for layer in module.modules():
        if type(layer) is torch.nn.Linear and layer.weight.dtype == torch.float32:
            layer.forward = partial(_linear, layer)


def _linear(layer: torch.nn.Linear, input: torch.Tensor) -> torch.Tensor:
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
        input, layer.weight, layer.bias, "none", [], ""
    )
    return product
