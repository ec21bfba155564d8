"""How far the host may run ahead of a device, and how long steps took there.

Owns CUDA's events and counts of memory. On a CPU a step is over when its call returns.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from serve.engine.fairness import Receipt
from serve.engine.models import Loaded


@dataclass(frozen=True)
class Made:
    """A step, as far as it is known when it is handed to the device."""

    loaded: Loaded
    receipt: Receipt | None
    """None where no row was stepped, such as while a picture was decoded."""
    side_s: float
    trace_warmup_s: float
    num_results: int


class Pacer:
    """Keeps the host at most one step ahead of a GPU, and tells how long each step took there.

    Without it the host would queue steps that nobody can leave or join any more.
    """

    def __init__(self) -> None:
        self.on_gpu = torch.cuda.is_available()
        self._started_s = 0.0
        self._start: Any = None
        self._last: tuple[Made, Any, Any] | None = None

    def begin(self) -> None:
        self._started_s = time.monotonic()
        if self.on_gpu:
            self._start = torch.cuda.Event(enable_timing=True)
            self._start.record()

    def end(self, step: Made) -> Iterator[tuple[Made, float]]:
        """The steps that are over by now, with their seconds: this one, or on a GPU the last."""
        if not self.on_gpu:
            yield step, time.monotonic() - self._started_s
            return
        end: Any = torch.cuda.Event(enable_timing=True)
        end.record()
        last, self._last = self._last, (step, self._start, end)
        if last is not None:
            last[2].synchronize()
            yield last[0], last[1].elapsed_time(last[2]) / 1000

    def memory(self) -> tuple[float, float | None]:
        """Bytes that the steps since the last word needed at most, and bytes that one may use."""
        if not self.on_gpu:
            return 0.0, None
        held = torch.cuda.memory_allocated()
        peak = torch.cuda.max_memory_allocated() - held
        torch.cuda.reset_peak_memory_stats()
        free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - held
        return float(peak), float(free)

    def clear(self) -> None:
        if self.on_gpu:
            torch.cuda.empty_cache()
