"""The Lightning module: one optimizer step, from batches to updated weights.

Owns the forward and backward passes of a step, clipping and the average of weights. Knows neither
how batches are chosen (`data.schedule`), nor how weights are updated (`optimizers`), nor how state
is stored (`callback`).
"""

import math
from contextlib import nullcontext
from typing import Any

import pytorch_lightning as pl
import torch

from rayjobs.dreambooth.config import DreamBoothConfig
from rayjobs.dreambooth.training import fsdp, lora
from rayjobs.dreambooth.training.batches import Batch
from rayjobs.dreambooth.training.objective import (
    Objective,
    errors,
    huber_c,
    prior_preserving_loss,
)
from rayjobs.dreambooth.training.optimizers import FusedBackward, build_optimizer, rate_factor
from rayjobs.dreambooth.training.tuned_model import TunedModel


class DreamBooth(pl.LightningModule):
    """Trains `tuned`; a Lightning batch is a worker's whole share of an optimizer step."""

    def __init__(
        self,
        config: DreamBoothConfig,
        tuned: TunedModel,
        objective: Objective,
        num_instance: int,
        num_prior: int,
        sharded: bool = False,
    ):
        super().__init__()
        self.automatic_optimization = False
        self.config = config
        self.tuned = tuned
        self.objective = objective
        self.num_instance, self.num_prior = num_instance, num_prior
        self.sharded, self._is_sharded = sharded, False
        self.step = 0
        """Optimizer steps made so far, also before a restart."""
        self.metrics: dict[str, float] = {}
        """Of the last step, over all workers."""
        self.stopped_with_patience: int | None = None
        """The patience with which the run was ended before its last step."""
        self.average: dict[str, torch.Tensor] = {}
        self._fused: FusedBackward | None = None
        fp16 = tuned.compute == torch.float16
        self.scaler = torch.amp.GradScaler(enabled=fp16) if fp16 else None

    def configure_model(self) -> None:
        if self.sharded and not self._is_sharded:
            assert self.device_mesh is not None
            fsdp.shard(self.tuned, self.device_mesh["data_parallel"])
            self._is_sharded = True

    def configure_optimizers(self) -> torch.optim.Optimizer:
        train = self.config.train
        self.optimizer = build_optimizer(self.config, self.tuned)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self._factor = rate_factor(train, self.optimizer)
        if train.fused_backward:
            self._fused = FusedBackward(self.optimizer, train.max_grad_norm)
        self._trained = self.tuned.trainable()
        if train.ema_decay is not None:
            self.average = {name: p.detach().clone() for name, p in self._trained.items()}
        return self.optimizer

    def on_train_start(self) -> None:
        for _, network in self.tuned.parts():
            network.train()

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        return batch  # each micro-batch is moved just before it is used

    def training_step(self, batches: list[Batch], _: int) -> None:
        self._set_rates()
        sums = torch.zeros(2, device=self.device)
        for number, batch in enumerate(batches):
            is_last = number + 1 == len(batches)
            with nullcontext() if is_last else self._without_gradient_sync():
                parts_2 = self.losses(batch.to(str(self.device))) * batch.counts
                # Workers' gradients are averaged; the parts of a loss add up.
                self._backward(parts_2.sum() * self.trainer.world_size)
            sums += parts_2.detach()
        norm = self._update()
        self._record(sums, norm)

    def losses(self, batch: Batch) -> torch.Tensor:
        """The rows' shares of the subject's and of the prior's loss, weighted, (2,) float32."""
        errors_B, weight_B = self._errors_and_weights(batch)
        shares = [
            prior_preserving_loss(
                errors_B * mask_B,
                weight_B,
                batch.is_prior_B,
                self.config.prior.weight,
                self.num_instance,
                self.num_prior,
            )
            for mask_B in (~batch.is_prior_B, batch.is_prior_B)
        ]
        return torch.stack(shares)

    def row_losses(self, batch: Batch) -> torch.Tensor:
        """Each row's own loss, weighted, (B,) float32."""
        errors_B, weight_B = self._errors_and_weights(batch)
        return errors_B * weight_B

    def _errors_and_weights(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        if self.config.lora.dropout:
            lora.set_dropout_keys(self.tuned.unet, batch.dropout_keys_B)
        text = batch.text or self.tuned.encode(batch.captions, batch.dropout_keys_B)
        x_BCHW, timesteps_B = self.objective.inputs(batch.z_BCHW, batch.noise_BCHW, batch.levels_B)
        target_BCHW = self.objective.target(batch.z_BCHW, batch.noise_BCHW, batch.levels_B)
        if self.config.prior.mode == "teacher" and batch.has_prior:
            teacher_BCHW = self.tuned.teach(
                x_BCHW, timesteps_B, batch.captions, text, batch.time_ids_B6
            )
            is_prior_B111 = batch.is_prior_B[:, None, None, None]
            target_BCHW = torch.where(is_prior_B111, teacher_BCHW, target_BCHW)
        predicted_BCHW = self.tuned.predict(x_BCHW, timesteps_B, text, batch.time_ids_B6)
        errors_B = self._errors(predicted_BCHW, target_BCHW, batch)
        return errors_B, self.objective.weight(batch.levels_B)

    def _errors(
        self, predicted_BCHW: torch.Tensor, target_BCHW: torch.Tensor, batch: Batch
    ) -> torch.Tensor:
        train, c_B = self.config.train, None
        if train.loss != "mse":
            sigmas_B = self.objective.sigmas(batch.levels_B)
            c_B = huber_c(sigmas_B, train.huber_c, train.huber_schedule)
        return errors(predicted_BCHW, target_BCHW, train.loss, c_B, batch.mask_B1HW)

    def _strategy(self) -> Any:
        return self.trainer.strategy

    def _without_gradient_sync(self) -> Any:
        """Gradients stay on this worker until the step's last backward pass."""
        blocked = getattr(self._strategy(), "block_backward_sync", nullcontext)
        return blocked()

    def _backward(self, loss: torch.Tensor) -> None:
        self.manual_backward(loss if self.scaler is None else self.scaler.scale(loss))

    def _set_rates(self) -> None:
        factor = self._factor(self.step)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor

    def _update(self) -> torch.Tensor:
        """Clip, step, update the average; return the gradients' norm."""
        norm = self._make_step() if self._fused is None else self._fused.take_norm()
        if self.average:
            averages = [self.average[name] for name in self._trained]
            now = [p.detach() for p in self._trained.values()]
            torch._foreach_lerp_(averages, now, 1 - self.config.train.ema_decay_at(self.step))
        return norm

    def _make_step(self) -> torch.Tensor:
        train, optimizer, trained = self.config.train, self.optimizer, self._trained
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(list(trained.values()), train.max_grad_norm)
        if self.scaler is None:
            optimizer.step()
        else:
            self.scaler.step(optimizer)
            self.scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return norm

    def _record(self, sums: torch.Tensor, norm: torch.Tensor) -> None:
        self.step += 1
        total = self._strategy().reduce(sums, reduce_op="sum")
        norm = getattr(norm, "full_tensor", lambda: norm)()
        # All in one copy: a GPU's host waits for each.
        instance, prior, length = torch.cat([total, norm.to(total)[None]]).cpu().tolist()
        self.metrics = {
            "step": self.step,
            "loss": instance + prior,
            "loss_instance": instance,
            "loss_prior": prior,
            "grad_norm": length,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
        }
        if self.scaler is None and not all(math.isfinite(value) for value in self.metrics.values()):
            raise FloatingPointError(
                f"step {self.step}: the loss or its gradient is not a number; lower "
                "train.learning_rate, or train in bf16 or fp32"
            )
        logged = {f"train/{name}": value for name, value in self.metrics.items() if name != "step"}
        for logger in self.loggers:
            logger.log_metrics(logged, step=self.step)
