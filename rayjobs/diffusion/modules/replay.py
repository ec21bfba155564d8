"""The UNet's call without Python, whose overhead exceeds the arithmetic of a small call.

A recording (torch.jit.trace) is the operators of one call, replayed in C++: a third less time for
small pictures on a CPU, and the same bits. Owns the recording and the check that it gives them.
Knows nothing of rows. torch calls its tracer deprecated and names torch.export, which replays in
Python and so spares nothing (measured), and torch.compile, which is the option `compile`.
"""

import warnings
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch

from rayjobs.diffusion.economy.deep import whole

MAX_SLOTS = 63
"""From 64 on diffusers' Upsample2D takes another way."""
MAX_PLAIN_S = 0.5
"""A call that takes longer has little of Python in it, and others wait while it is verified."""
MAX_RECORDINGS = 4
"""Of calls that have other tensors beside the weights."""


@dataclass(frozen=True)
class Beside:
    """Tensors that modules use beside their weights in a call, such as adapters' factors."""

    places: tuple[tuple[dict[str, torch.Tensor], str], ...] = ()
    """Where the modules find them."""
    names: str = ""
    """Stands for what they are: a recording is for one such."""
    shapes: Hashable = ()


NOTHING = Beside()


class Replay:
    """Calls `unet` in one of its ways, by the recording of that where it has given the same bits.

    Whatever Python decides on the way is a constant in a recording. So every shape of a call is
    verified first, by a call of either kind. Weights are inputs: a recording holds none.
    """

    def __init__(self, unet: Any, way: Callable[..., Any] = whole):
        self.unet = unet
        self._way = way
        self._slots = [
            (tensors, name)
            for module in unet.modules()
            for tensors in (module._parameters, module._buffers)
            for name in tensors
            if tensors[name] is not None
        ]
        self.trace_warmup_s = 0.0
        """What first calls of a shape took longer than its others will."""
        self._replayed_s = 0.0
        self._recordings: dict[tuple[str, int], Any] = {}
        """By what is beside the weights, and the number of inputs: those of controls are more."""
        self._verified: dict[tuple[Hashable, ...], bool] = {}

    def __call__(
        self,
        x_PCHW: torch.Tensor,
        t_P: torch.Tensor,
        arguments: Mapping[str, Any],
        beside: Beside = NOTHING,
    ) -> Any:
        """The prediction (P, C, H, W) and what else the way gives, perhaps inference tensors;
        `arguments` are the way's own: of the same names where they are as many. Raises what it
        raises.
        """
        inputs = (x_PCHW, t_P, *_flat(arguments))
        # Texts have lengths too.
        shape = (beside.shapes, *(tensor.shape for tensor in inputs))
        if self._verified.get(shape):
            try:
                return self._replay(inputs, beside)
            except RuntimeError:  # whatever it is: the module tells it by an error of its kind
                self._verified.pop(shape)
        started_s = perf_counter()
        given = self._way(self.unet, x_PCHW, t_P, arguments)
        if shape in self._verified or not _tensors(given)[0].isfinite().all():
            return given
        plain_s = perf_counter() - started_s
        is_short = plain_s <= MAX_PLAIN_S
        verified = is_short and self._verify(inputs, arguments, beside, _tensors(given))
        self._verified[shape] = verified
        usual_s = self._replayed_s if verified else plain_s
        self.trace_warmup_s += perf_counter() - started_s - usual_s
        return given

    def _verify(
        self,
        inputs: tuple[torch.Tensor, ...],
        arguments: Mapping[str, Any],
        beside: Beside,
        given: tuple[torch.Tensor, ...],
    ) -> bool:
        if len(inputs[0]) > MAX_SLOTS:
            return False
        try:
            kind = beside.names, len(inputs)
            if kind not in self._recordings:
                if beside.names and len(self._recordings) > MAX_RECORDINGS:
                    return False
                self._recordings[kind] = self._record(inputs, arguments, beside)
            started_s = perf_counter()
            replayed = _tensors(self._replay(inputs, beside))
            is_same = all(map(torch.equal, replayed, given))
            self._replayed_s = perf_counter() - started_s
            return is_same
        except Exception:  # such as sides that the recording is not for, or a tracer's limit
            return False

    def _replay(self, inputs: tuple[torch.Tensor, ...], beside: Beside) -> Any:
        weights = [tensors[name] for tensors, name in (*self._slots, *beside.places)]
        # Nothing is fused or specialized: operators are called as Python calls them.
        with torch.inference_mode(), torch.jit.optimized_execution(False):
            return self._recordings[beside.names, len(inputs)](*inputs, *weights)

    def _record(
        self, inputs: tuple[torch.Tensor, ...], arguments: Mapping[str, Any], beside: Beside
    ) -> Any:
        slots = (*self._slots, *beside.places)
        weights = [tensors[name] for tensors, name in slots]

        def call(x_PCHW: torch.Tensor, t_P: torch.Tensor, *rest: torch.Tensor) -> Any:
            """The UNet on weights that the tracer knows as inputs."""
            given = iter(rest)
            shaped = _shaped(arguments, given)
            try:
                _put(slots, given)
                return self._way(self.unet, x_PCHW, t_P, shaped)
            finally:
                _put(slots, iter(weights))

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tracer's, of what the proof is there for
            return torch.jit.trace(call, (*inputs, *weights), check_trace=False)


def _put(slots: Any, tensors: Any) -> None:
    """Other tensors in the places of weights."""
    for place, name in slots:
        place[name] = next(tensors)


def _tensors(given: Any) -> tuple[torch.Tensor, ...]:
    """The prediction, and what a way gives besides."""
    return given if isinstance(given, tuple) else (given,)


def _flat(arguments: Mapping[str, Any]) -> list[torch.Tensor]:
    """The tensors of nested arguments, in order."""
    tensors = []
    for value in arguments.values():
        if isinstance(value, Mapping):
            tensors += _flat(value)
        else:
            tensors += value if isinstance(value, tuple) else [value]
    return tensors


def _shaped(arguments: Mapping[str, Any], tensors: Any) -> dict[str, Any]:
    """Other tensors in place of those in `arguments`."""
    shaped: dict[str, Any] = {}
    for name, value in arguments.items():
        if isinstance(value, Mapping):
            shaped[name] = _shaped(value, tensors)
        elif isinstance(value, tuple):
            shaped[name] = tuple(next(tensors) for _ in value)
        else:
            shaped[name] = next(tensors)
    return shaped
