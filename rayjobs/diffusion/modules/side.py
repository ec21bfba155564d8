"""Work on a model's device beside its steps: on a GPU in a thread and a stream of its own.

A CPU has nothing idle to do it with, and two teams of threads on the same cores slow each other
down (by a quarter, measured): there it is done where it is handed over. Knows nothing of the work.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import torch

T = TypeVar("T")


class Executor(Protocol):
    def submit(self, work: Callable[..., T], /, *args: Any) -> Future[T]: ...


class AtOnce:
    """In the caller's own thread, before the call returns."""

    def submit(self, work: Callable[..., T], /, *args: Any) -> Future[T]:
        future: Future[T] = Future()
        try:
            future.set_result(work(*args))
        except Exception as error:
            future.set_exception(error)
        return future


class SideStream:
    """In a thread and a CUDA stream, one piece of work after the other, each to its end."""

    def __init__(self, device: str, name: str):
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._stream = torch.cuda.Stream(device)

    def submit(self, work: Callable[..., T], /, *args: Any) -> Future[T]:
        """Of what the host has: nothing that is queued on the device is waited for."""
        return self._thread.submit(lambda: self._run(None, work, *args))

    def submit_after(self, work: Callable[..., T], /, *args: Any) -> Future[T]:
        """Of what the device is computing: after all that is queued there now."""
        event = torch.cuda.current_stream(self._stream.device).record_event()
        return self._thread.submit(lambda: self._run(event, work, *args))

    @torch.no_grad()
    def _run(self, event: Any, work: Callable[..., T], *args: Any) -> T:
        with torch.cuda.stream(self._stream):
            if event is not None:
                self._stream.wait_event(event)
            result = work(*args)
            self._stream.synchronize()
            return result


def beside_steps(device: str, name: str) -> Executor:
    """Where work that takes nothing from the device is done; `name` is its thread's."""
    return SideStream(device, name) if device.startswith("cuda") else AtOnce()
