"""An optimizer step's parts, beside diffusers' own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.training_utils import EMAModel

from rayjobs.dreambooth.training import worker
from rayjobs.dreambooth.training.module import DreamBooth
from tests.dreambooth.fitting import resolved, settings

pytestmark = pytest.mark.model


def module(folder: Path, photos: Path, **train: Any) -> DreamBooth:
    """With its optimizer, before the first step."""
    run = resolved(settings(folder, photos, **train))
    made = worker.build(run, worker.load(run.config, "cpu", torch.float32), torch.float32)[1]
    made.configure_optimizers()
    return made


@pytest.mark.parametrize("decay", [0.5, 0.9999])
def test_the_average_is_that_of_diffusers(
    folders: dict[str, Path], photos: Path, decay: float
) -> None:
    """Also of 30 steps with a decay that is meant for thousands."""
    made = module(folders["sd"], photos, ema_decay=decay, steps=30, text_encoders=False)
    trained = made.tuned.trainable()
    theirs = EMAModel(list(trained.values()), decay=decay)
    torch.manual_seed(0)
    for _ in range(30):
        for parameter in trained.values():
            parameter.grad = torch.randn_like(parameter)
        made._update()
        made.step += 1
        theirs.step(list(trained.values()))
    for ours, other in zip(made.average.values(), theirs.shadow_params, strict=True):
        assert (ours - other).abs().max() < 1e-6
    begun = module(folders["sd"], photos, ema_decay=decay, text_encoders=False).average
    moved = [(made.average[n] - begun[n]).norm() / (trained[n] - begun[n]).norm() for n in begun]
    assert min(moved) > 0.5, "what is exported is mostly what was trained"
