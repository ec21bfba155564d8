"""What an optimizer step costs a GPU, on a twin of one: micro-batches, update and metrics."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rayjobs.dreambooth.data.schedule import micro_batches
from rayjobs.dreambooth.training import worker
from tests.cuda_backward import backward
from tests.cuda_twin import twin_gpu
from tests.dreambooth.fitting import fit, resolved, settings

pytestmark = [
    pytest.mark.model,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]


@pytest.mark.parametrize(
    ("mode", "train"),
    [
        ("images", {"text_encoders": False, "min_snr_gamma": 5.0, "loss": "huber"}),
        pytest.param(
            *("teacher", {"text_encoders": True, "caption_syntax": "a1111"}), marks=pytest.mark.slow
        ),
        pytest.param(
            *("images", {"method": "full", "text_encoders": False, "ema_decay": 0.5}),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_no_micro_batch_waits(
    folders: dict[str, Path], photos: Path, mode: str, train: dict[str, Any]
) -> None:
    """But the first, for tables that stay on the device; a step waits once, for its metrics."""
    config = settings(folders["sdxl"], photos, mode, micro_batch_size=1, **train)
    config = config.model_copy(update={"lora": config.lora.model_copy(update={"dropout": 0.1})})
    run = resolved(config)
    _, losses = fit(run)
    with twin_gpu() as gpu:
        model = worker.load(run.config, "cuda:0", torch.float32)
        batches, module = worker.build(run, model, torch.float32)
        played: Any = module
        played._device, played._backward = torch.device("cuda:0"), backward
        played._trainer = SimpleNamespace(world_size=1, loggers=[])
        played._strategy = lambda: SimpleNamespace(reduce=lambda sums, reduce_op: sums)
        module.configure_optimizers()
        module.on_train_start()
        for step, loss in enumerate(losses):
            made = [batches.batch(part) for part in micro_batches(batches.schedule.rows(step), 1)]
            with gpu.counting() as counts:
                module.training_step(made, 0)
            assert module.metrics == pytest.approx(loss, rel=1e-4)
        assert [wait.what for wait in counts.waits] == ["copy to the host of (3,)"]
        assert counts.uploads >= 4 * len(made), "the batches themselves"
        assert all(p.is_cuda for p in module.tuned.trainable().values())
