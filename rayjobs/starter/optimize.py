"""AdamW over decided batches, with checkpoints: how every part of the starter model is trained.

Owns the rate's course, the average of weights and the going on of a stopped run. Knows nothing of
what is trained.
"""

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

CHECKPOINT_EVERY = 250


@dataclass(frozen=True)
class Schedule:
    """Each cycle is that many optimizer steps from warm-up to zero, as cosine restarts (arXiv
    1608.03983) have it; `rate` is AdamW's peak value, `ema` the decay of the average."""

    cycles: tuple[int, ...]
    rate: float
    warmup_steps: int = 200
    ema: float = 0.998

    def decay(self, step: int) -> float:
        """The rate at `step` as a fraction of the peak."""
        for num_steps in self.cycles[:-1]:
            if step < num_steps:
                break
            step -= num_steps
        else:
            num_steps = self.cycles[-1]
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, num_steps - self.warmup_steps)
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))


def optimize(
    model: torch.nn.Module,
    loss: Callable[[int], torch.Tensor],
    checkpoint: Path,
    schedule: Schedule,
) -> None:
    """AdamW with warm-up, cosine decay, clipping; `model` ends with the average of its weights."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=schedule.rate, weight_decay=1e-2)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(schedule.ema)
    )
    first, num_steps = 0, sum(schedule.cycles)
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    model.train()
    started, recent = time.monotonic(), []
    for step in range(first, num_steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate * schedule.decay(step)
        value = loss(step)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        recent.append(float(value.detach()))
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == num_steps:
            _save_checkpoint(checkpoint, model, average, optimizer, step + 1)
            step_s = (time.monotonic() - started) / (step + 1 - first)
            left_min = (num_steps - step - 1) * step_s / 60
            print(
                f"{checkpoint.stem} step {step + 1}/{num_steps} loss {np.mean(recent):.4f} "
                f"{step_s:.2f} s/step, {left_min:.0f} min left",
                flush=True,
            )
            recent = []
    model.load_state_dict(average.module.state_dict())


def _save_checkpoint(
    path: Path,
    model: torch.nn.Module,
    average: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
) -> None:
    state = {
        "model": model.state_dict(),
        "average": average.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
    }
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)
