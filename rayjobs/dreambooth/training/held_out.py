"""The loss at fixed noise: of photographs, at the same levels and with the same noise every time.

Owns how it is measured and when a run that no longer gains by it ends. It is free of the noise that
a step's own loss has, so that two of them can be compared. Knows nothing of checkpoints.
"""

from typing import Any

import pytorch_lightning as pl
import torch

from rayjobs.dreambooth import results
from rayjobs.dreambooth.data.schedule import Row, micro_batches
from rayjobs.dreambooth.resolved import ResolvedRun
from rayjobs.dreambooth.training.batches import Batches
from rayjobs.dreambooth.training.module import DreamBooth


def measure(module: DreamBooth, batches: Batches, rows: list[Row], most: int) -> torch.Tensor:
    """The sum of the rows' weighted losses, (1,) float32, in calls of at most `most` rows."""
    total = torch.zeros(1, device=module.device)
    networks = [network for _, network in module.tuned.parts()]
    were_training = [network.training for network in networks]
    for network in networks:
        network.eval()
    with torch.no_grad():
        for part in micro_batches(rows, most):
            total += module.row_losses(batches.batch(part).to(str(module.device))).sum()
    for network, training in zip(networks, were_training, strict=True):
        network.train(training)
    return total


class HeldOutLoss(pl.Callback):
    """Adds `validation_loss` to the metrics of the steps at which it is due."""

    def __init__(self, run: ResolvedRun, batches: Batches, rank: int, num_workers: int):
        self.config, self.batches = run.config, batches
        self.rank, self.num_workers = rank, num_workers
        self.history: list[tuple[int, float]] = []
        """The step and the loss of each measurement."""

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        every = self.config.validation.loss_every_n_steps
        if pl_module.step % every and pl_module.step != self.config.train.steps:
            return
        rows = self.batches.fixed_rows
        # Sharded workers must make the same calls.
        share = rows if pl_module.sharded else rows[self.rank :: self.num_workers]
        most = self.config.train.micro_batch_size or self.config.train.global_batch_size
        total = measure(pl_module, self.batches, share, most)
        if not pl_module.sharded:
            total = trainer.strategy.reduce(total, reduce_op="sum")
        loss = float(total) / len(rows)
        pl_module.metrics["validation_loss"] = loss
        for logger in pl_module.loggers:
            logger.log_metrics({"validation/loss": loss}, step=pl_module.step)
        self.history.append((pl_module.step, loss))
        patience = self.config.validation.patience
        if patience is not None and results.has_stalled(self.history, patience):
            pl_module.stopped_with_patience = patience
            trainer.should_stop = True
