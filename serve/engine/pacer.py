"""Keeps the host close to the device, and measures how long steps took there.

Owns CUDA events and the peak of a step's memory. On a CPU a step is over when its call returns.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from serve.engine import memory
from serve.engine.fairness import BatchUsage
from serve.engine.models import LoadedModel


@dataclass(frozen=True)
class StepTiming:
    """A step, as far as it is known when it is queued on the device."""

    loaded: LoadedModel
    usage: BatchUsage | None
    """None where no row was stepped, for example while an image was decoded."""
    vae_s: float
    """Host time for prompts and images, part of the step."""
    trace_warmup_s: float
    """Time for recording the UNet, not repeated by later steps."""
    num_results: int


class Pacer:
    """Keeps the host at most one step ahead of a GPU, and measures each step there.

    Without it the host would queue many steps, and a request could neither join nor leave them.
    """

    def __init__(self) -> None:
        self.on_gpu = torch.cuda.is_available()
        self._started_s = 0.0
        self._start: Any = None
        self._last: tuple[StepTiming, Any, Any] | None = None

    def begin(self) -> None:
        self._started_s = time.monotonic()
        if self.on_gpu:
            self._start = torch.cuda.Event(enable_timing=True)
            self._start.record()

    def end(self, step: StepTiming) -> Iterator[tuple[StepTiming, float]]:
        """The steps that are over by now, with their seconds: this one, or on a GPU the last."""
        if not self.on_gpu:
            yield step, time.monotonic() - self._started_s
            return
        end: Any = torch.cuda.Event(enable_timing=True)
        end.record()
        yield from self.finish()
        self._last = (step, self._start, end)

    def finish(self) -> Iterator[tuple[StepTiming, float]]:
        """The last step once it is over; then nothing here keeps its model in memory."""
        last, self._last = self._last, None
        if last is not None:
            last[2].synchronize()
            yield last[0], last[1].elapsed_time(last[2]) / 1000

    def memory(self) -> tuple[float, float] | None:
        """Bytes that the step just queued needed at peak, and bytes that a step may use.

        None on a CPU. Memory is allocated when a step is queued, so this is read before `end`.
        """
        if not self.on_gpu:
            return None
        peak = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return float(peak), memory.for_a_step()

    def clear(self) -> None:
        if self.on_gpu:
            torch.cuda.empty_cache()
