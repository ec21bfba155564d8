"""A whole training in this process: no Ray, no checkpoints. Only what the steps compute."""

import warnings
from typing import Any

import pytorch_lightning as pl
import torch

from rayjobs.dreambooth.resolved import ResolvedRun
from rayjobs.dreambooth.training import worker
from rayjobs.dreambooth.training.tuned_model import TunedModel


class StepMetrics(pl.Callback):
    """The metrics of every step."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.rows.append(pl_module.metrics)


def fit(run: ResolvedRun) -> tuple[TunedModel, list[dict[str, float]]]:
    """Every step of a run; the tuned model and each step's metrics."""
    config = run.config
    model = worker.load(config, "cpu", torch.float32)
    batches, module = worker.build(run, model, torch.float32)
    batches.fill_cache(0, 1)
    seen = StepMetrics()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        callbacks=[seen],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=1,
    )
    most = config.train.micro_batch_size
    with warnings.catch_warnings():
        # Frozen networks are not in training mode, on purpose.
        warnings.filterwarnings("ignore", "Found .* in eval mode")
        trainer.fit(module, train_dataloaders=batches.steps(0, config.train.steps, 0, 1, most))
    assert [row["step"] for row in seen.rows] == list(range(1, config.train.steps + 1))
    return module.tuned.eval(), seen.rows
