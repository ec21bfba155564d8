"""A GPU where there is none: tensors that say cuda:0 around data of the CPU.

What a GPU does not compute is refused here too: tensors of both devices in one operator, and
reading on the host what has not come there yet. Counts launches, and waits: where the host stands
still until the device has done all that is queued. A copy from memory that is not pinned is one,
whether it is called non-blocking or not. Numbers are those of the CPU, so that what differs from it
was computed otherwise. Attention counts as the operators of its plain form.

    with twin_gpu() as gpu:
        model = load_model("starter", ModelOptions(device="cuda:0"))
        with gpu.counting() as counts:
            ...
"""

import ctypes
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.cuda_device import CUDA, TwinGpu, present, the_gpu


class _Mode(TorchDispatchMode):
    """Hands this thread's operators to the device."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return the_gpu().call(func, args, dict(kwargs or {}))


@dataclass(frozen=True)
class TwinEvent:
    """A place in the device's queue."""

    gpu: TwinGpu
    number: int

    def query(self) -> bool:
        """It is over: nothing takes time here."""
        self.gpu.arrived(self.number)
        return True

    def synchronize(self) -> None:
        self.gpu.wait("event")
        self.gpu.arrived(self.number)


class TwinStream:
    """A queue of the device; work in its context is the device's in any thread."""

    def __init__(self, device: Any = None):
        self.device = CUDA
        self._entered = ExitStack()

    def record_event(self) -> TwinEvent:
        return TwinEvent(the_gpu(), the_gpu().num_copies)

    def wait_event(self, event: TwinEvent) -> None:
        """The host does not wait for it."""

    def synchronize(self) -> None:
        the_gpu().wait_for_all("stream")

    def __enter__(self) -> None:
        self._entered.enter_context(_played())

    def __exit__(self, *error: Any) -> None:
        self._entered.close()


@contextmanager
def twin_gpu() -> Generator[TwinGpu]:
    """torch.cuda as far as this package calls it, and this thread's operators on a twin."""
    stream = TwinStream()
    replaced = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "current_stream": lambda device=None: stream,
        "stream": lambda stream: stream,
        "Stream": TwinStream,
        "empty_cache": lambda: None,
    }
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name, value in replaced.items():
            patch.setattr(torch.cuda, name, value)
        stack.enter_context(_device_guard())
        # What a module holds is replaced as a whole when it moves.
        overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrites)
        gpu = TwinGpu()
        stack.enter_context(present(gpu))
        stack.enter_context(_played())
        yield gpu


@contextmanager
def _played() -> Generator[None]:
    """This thread's operators go to the device."""
    # Numbers of Python become a tensor of the host first, and go to the device as any other.
    lifted = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with _Mode():
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(lifted)


@contextmanager
def _device_guard() -> Generator[None]:
    """What torch asks of a device before it calls an operator: here what the meta device answers.

    A build for CPUs has nothing at CUDA's place, and then cannot even take a slice.
    """
    libc10 = Path(torch.__file__).with_name("lib") / "libc10.so"
    guards = (ctypes.c_void_p * 15).in_dll(
        ctypes.CDLL(str(libc10)), "_ZN3c104impl26device_guard_impl_registryE"
    )
    own = guards[1]
    guards[1] = own or guards[14]
    try:
        yield
    finally:
        guards[1] = own
