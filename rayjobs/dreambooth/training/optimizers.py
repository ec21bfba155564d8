"""Which optimizer trains which weights, at which rate, and when: after the gradients or with them.

Owns the groups of parameters, their rates and the update of single weights. Knows no losses.
"""

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from transformers.optimization import Adafactor

from rayjobs.config import BadInput
from rayjobs.dreambooth.config import DreamBoothConfig, TrainConfig
from rayjobs.dreambooth.training.tuned_model import TunedModel


def build_optimizer(config: DreamBoothConfig, tuned: TunedModel) -> torch.optim.Optimizer:
    """Groups for the UNet, the text encoders and learned tokens, each with its learning rate.

    Raises BadInput for a package that is missing, or a block that no trained weight is in.
    """
    train, groups = config.train, list(parameter_groups(config, tuned))
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
    if train.optimizer == "adafactor":
        # With rates of our own, as kohya's tools have them: neither relative to the step nor to
        # the weights' size.
        absolute = {"scale_parameter": False, "relative_step": False, "warmup_init": False}
        return Adafactor(groups, weight_decay=train.weight_decay, **absolute)
    settings: dict[str, Any] = {
        "betas": (train.adam_beta1, train.adam_beta2),
        "weight_decay": train.weight_decay,
    }
    if train.optimizer == "adamw8bit":
        package = _import("bitsandbytes", "train.optimizer adamw8bit", "bitsandbytes")
        return package.optim.AdamW8bit(groups, **settings)
    # Fused: one pass over a LoRA's many small matrices, on CPUs and GPUs alike.
    return torch.optim.AdamW(groups, **settings, fused=True)


def parameter_groups(config: DreamBoothConfig, tuned: TunedModel) -> Iterator[dict[str, Any]]:
    """Parameters of one part and one rate each: the UNet's, the text encoders', the tokens'."""
    train = config.train
    text_rate = train.text_encoder_learning_rate or train.usual_text_rate
    rates = {"unet": train.learning_rate, "text_encoders": text_rate}
    rates["learned"] = config.inversion.learning_rate
    groups: dict[tuple[str, float], list[torch.nn.Parameter]] = {}
    unused = set(train.block_rates)
    for part in rates:
        for name, parameter in tuned.trainable().items():
            if name.split(".")[0] == part:
                block = _block_of(name, train)
                unused.discard(block)
                factor = train.block_rates.get(block, 1.0) * _plus(name, config)
                groups.setdefault((part, factor), []).append(parameter)
    if unused:
        raise BadInput(f"train.block_rates: no trained weight is in {', '.join(sorted(unused))}")
    for (part, factor), parameters in groups.items():
        group = {"params": parameters, "lr": rates[part] * factor}
        yield group | ({"weight_decay": 0.0} if part == "learned" else {})


def _block_of(name: str, train: TrainConfig) -> str:
    """The longest of the blocks with a rate of their own that this weight is in, else nothing."""
    inside = [block for block in train.block_rates if name.startswith(f"unet.{block}.")]
    return max(inside, key=len, default="")


def _plus(name: str, config: DreamBoothConfig) -> float:
    """LoRA+ (arXiv 2402.12354): the matrices B learn faster than A."""
    return config.lora.plus_ratio if ".lora_B." in name else 1.0


def rate_factor(train: TrainConfig, optimizer: torch.optim.Optimizer) -> Callable[[int], float]:
    """The learning rate's factor as a function of the step alone: a resumed run has no more."""
    scheduler: Any = get_scheduler(
        train.schedule,
        optimizer,
        num_warmup_steps=train.warmup_steps,
        num_training_steps=train.steps,
    )
    factor: Callable[[int], float] = scheduler.lr_lambdas[0]
    return factor


class FusedBackward:
    """Updates each weight as soon as its gradient is there, and frees it: no two need be held.

    Each gradient is clipped by its own norm. For one backward pass a step on one worker.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, max_grad_norm: float):
        self.optimizer, self.max_grad_norm = optimizer, max_grad_norm
        self._squares: list[torch.Tensor] = []
        for number, group in enumerate(optimizer.param_groups):
            for parameter in group["params"]:
                parameter.register_post_accumulate_grad_hook(
                    lambda parameter, number=number: self._update(parameter, number)
                )

    def take_norm(self) -> torch.Tensor:
        """The norm of all gradients since the last call."""
        squares, self._squares = self._squares, []
        return torch.stack(squares).sum().sqrt()

    def _update(self, parameter: torch.Tensor, group: int) -> None:
        norm = torch.nn.utils.clip_grad_norm_([parameter], self.max_grad_norm)
        self._squares.append(norm.detach() ** 2)
        groups = self.optimizer.param_groups
        self.optimizer.param_groups = [{**groups[group], "params": [parameter]}]
        try:
            self.optimizer.step()
        finally:
            self.optimizer.param_groups = groups
        parameter.grad = None


def _import(module: str, key: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise BadInput(f"{key} needs the package {package}; install it on every node") from None
