"""Activations of a CPU model that give a row the same bits in every slot of a call.

torch divides a tensor among its threads and computes the end of each thread's part by other
instructions than the rest. SiLU and the sigmoid have other last bits there, so that an element's
bits depend on where in the tensor it lies (seen with 3, 6, 7 and 12 threads, and with one where a
layer is as odd as 37). Owns the arithmetic of these parts; where one ends oddly, each row is
computed by itself, as it would be anywhere else.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from transformers.activations import QuickGELUActivation

KINDS = (torch.nn.SiLU, torch.nn.Mish, QuickGELUActivation)
GRAIN = 32768
"""Elements below which torch gives a thread no part of its own (at::internal::GRAIN_SIZE)."""
WIDEST = 128
"""Elements that the widest loop takes at once: two vectors of 64 bytes, of one byte each."""


def use_for_activations(module: torch.nn.Module) -> None:
    """Have the activations in `module` give equal rows equal bits."""
    for layer in module.modules():
        if type(layer) in KINDS:
            layer.forward = partial(_each, layer.forward)


def _each(activation: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    if len(x) == 1 or _ends_evenly(x.numel()):
        return activation(x)
    return torch.cat([activation(row) for row in x.split(1)])


def _ends_evenly(numel: int) -> bool:
    """Whether every thread's part ends where the widest loop does."""
    parts = max(1, min(torch.get_num_threads(), math.ceil(numel / GRAIN)))
    return numel % WIDEST == 0 and math.ceil(numel / parts) % WIDEST == 0
