"""The Lightning module: one optimizer step, from batches to updated weights.

Owns the forward and backward passes of a step, clipping, the learning rate and the average of
weights. Knows neither how batches are chosen (`data.schedule`) nor how state is stored
(`callback`).
"""

import math
from contextlib import nullcontext
from typing import Any

import pytorch_lightning as pl
import torch
from diffusers.optimization import get_scheduler

from rayjobs.config import BadInput
from rayjobs.dreambooth.config import DreamBoothConfig, TrainConfig
from rayjobs.dreambooth.training import fsdp, lora
from rayjobs.dreambooth.training.batches import Batch
from rayjobs.dreambooth.training.objective import (
    Objective,
    errors,
    huber_c,
    prior_preserving_loss,
)
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
        self.average: dict[str, torch.Tensor] = {}
        fp16 = tuned.compute == torch.float16
        self.scaler = torch.amp.GradScaler(enabled=fp16) if fp16 else None

    def configure_model(self) -> None:
        if self.sharded and not self._is_sharded:
            assert self.device_mesh is not None
            fsdp.shard(self.tuned, self.device_mesh["data_parallel"])
            self._is_sharded = True

    def configure_optimizers(self) -> torch.optim.Optimizer:
        self.optimizer = build_optimizer(
            self.config.train, self.tuned, self.config.inversion.learning_rate
        )
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self._factor = _rate_factor(self.config.train, self.optimizer)
        self._trained = self.tuned.trainable()
        if self.config.train.ema_decay is not None:
            self.average = {name: p.detach().clone() for name, p in self._trained.items()}
        return self.optimizer

    def on_train_start(self) -> None:
        for _, network in self.tuned.parts():
            network.train()

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        return batch  # each micro-batch is moved just before it is used

    def training_step(self, batches: list[Batch], _: int) -> None:
        sums = torch.zeros(2, device=self.device)
        for number, batch in enumerate(batches):
            is_last = number + 1 == len(batches)
            with nullcontext() if is_last else self._without_gradient_sync():
                parts_2 = self.losses(batch.to(str(self.device)))
                # Workers' gradients are averaged; the parts of a loss add up.
                self._backward(parts_2.sum() * self.trainer.world_size)
            sums += parts_2.detach()
        norm = self._update()
        self._record(sums, norm)

    def losses(self, batch: Batch) -> torch.Tensor:
        """The rows' shares of the subject's and of the prior's loss, weighted, (2,) float32."""
        if self.config.lora.dropout:
            for _, network in self.tuned.parts():
                lora.set_dropout_keys(network, batch.dropout_keys_B)
        text = batch.text or self.tuned.encode(batch.captions)
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
        weight_B = self.objective.weight(batch.levels_B)
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

    def _update(self) -> torch.Tensor:
        """Clip, step, update the average; return the gradients' norm."""
        train, optimizer = self.config.train, self.optimizer
        factor = self._factor(self.step)
        for group, rate in zip(optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        trained = self._trained
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(list(trained.values()), train.max_grad_norm)
        if self.scaler is None:
            optimizer.step()
        else:
            self.scaler.step(optimizer)
            self.scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if self.average:
            averages = [self.average[name] for name in trained]
            now = [p.detach() for p in trained.values()]
            torch._foreach_lerp_(averages, now, 1 - train.ema_decay_at(self.step))
        return norm

    def _record(self, sums: torch.Tensor, norm: torch.Tensor) -> None:
        self.step += 1
        total = self._strategy().reduce(sums, reduce_op="sum")
        instance, prior = (float(value) for value in total)
        norm = getattr(norm, "full_tensor", lambda: norm)()
        self.metrics = {
            "step": self.step,
            "loss": instance + prior,
            "loss_instance": instance,
            "loss_prior": prior,
            "grad_norm": float(norm),
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


def build_optimizer(
    train: TrainConfig, tuned: TunedModel, token_rate: float = 0.0
) -> torch.optim.Optimizer:
    """Groups for the UNet, the text encoders and learned tokens, each with its learning rate."""
    unet, text, learned = [], [], []
    for name, parameter in tuned.trainable().items():
        part = name.split(".")[0]
        {"unet": unet, "text_encoders": text, "learned": learned}[part].append(parameter)
    text_rate = train.text_encoder_learning_rate or train.learning_rate / 10
    groups: list[dict[str, Any]] = [
        {"params": unet, "lr": train.learning_rate},
        {"params": text, "lr": text_rate},
        {"params": learned, "lr": token_rate, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if train.optimizer == "prodigy":
        prodigy: Any = _import("prodigyopt", "train.optimizer prodigy", "prodigyopt")
        return prodigy.Prodigy(
            groups,
            betas=(train.adam_beta1, train.adam_beta2),
            weight_decay=train.weight_decay,
            decouple=True,
            use_bias_correction=True,
            safeguard_warmup=True,
        )
    settings: dict[str, Any] = {
        "betas": (train.adam_beta1, train.adam_beta2),
        "weight_decay": train.weight_decay,
    }
    if train.optimizer == "adamw8bit":
        package = _import("bitsandbytes", "train.optimizer adamw8bit", "bitsandbytes")
        return package.optim.AdamW8bit(groups, **settings)
    # Fused: one pass over a LoRA's many small matrices, on CPUs and GPUs alike.
    return torch.optim.AdamW(groups, **settings, fused=True)


def _import(module: str, key: str, package: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        raise BadInput(f"{key} needs the package {package}; install it on every node") from None


def _rate_factor(train: TrainConfig, optimizer: torch.optim.Optimizer) -> Any:
    """The learning rate's factor as a function of the step alone: a resumed run has no more."""
    scheduler: Any = get_scheduler(
        train.schedule,
        optimizer,
        num_warmup_steps=train.warmup_steps,
        num_training_steps=train.steps,
    )
    return scheduler.lr_lambdas[0]
