"""Between the host and the model's device, by copies that nobody waits for.

From memory that the system may move, a copy to a GPU waits for all that is queued there: a step in
which the host waits once leaves the GPU idle until the next one is queued. Owns the copies that do
not wait, and makes the code of others use them. Knows nothing of what is copied.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


def upload(tensor: torch.Tensor, device: str | torch.device) -> torch.Tensor:
    """A host tensor on a device: at once on a CPU; on a GPU before what is queued from now on."""
    if tensor.is_cuda or torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class Download:
    """A copy of a tensor on its way to the host."""

    def __init__(self, tensor: torch.Tensor):
        self._host = tensor.to("cpu", non_blocking=True)
        self._copied: Any = None
        if tensor.is_cuda:
            self._copied = torch.cuda.current_stream(tensor.device).record_event()

    @property
    def is_over(self) -> bool:
        return self._copied is None or self._copied.query()

    def get(self) -> torch.Tensor:
        """The tensor on the host; waits for it where it is not over."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host


class Uploading(TorchFunctionMode):
    """Within this context, what others copy to a GPU goes there by `upload`.

    Single numbers stay on the host, where arithmetic takes them from for either device: what is
    computed of them, up to a small system of equations, then costs the GPU nothing.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        device = next(filter(_is_cuda, (*args, *kwargs.values())), None)
        is_copy = func is torch.Tensor.to and not args[0].is_cuda
        if device is None or not (is_copy or (func is torch.ones and args[0] == ())):
            return func(*args, **kwargs)
        here = {name: "cpu" if _is_cuda(value) else value for name, value in kwargs.items()}
        made = func(*("cpu" if _is_cuda(value) else value for value in args), **here)
        return upload(made, device) if made.ndim else made


def _is_cuda(value: Any) -> bool:
    return isinstance(value, torch.device) and value.type == "cuda"
