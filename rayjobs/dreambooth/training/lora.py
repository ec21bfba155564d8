"""LoRA on the networks that are tuned: added, with reproducible dropout, and read out again.

Owns which layers get an adapter and its names in files. peft owns the arithmetic.
"""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model_state_dict

from rayjobs.dreambooth.config import LoraConfig
from rayjobs.dreambooth.data import rng

NAME = "default"
ATTENTION = ("to_k", "to_q", "to_v", "to_out.0")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
TEXT = ("q_proj", "k_proj", "v_proj", "out_proj")


class KeyedDropout(torch.nn.Module):
    """Dropout whose mask depends on each row's key and this layer's name, and on nothing else."""

    def __init__(self, drop: float, name: str):
        super().__init__()
        self.drop = drop
        self.salt = rng.key(name)
        self.keys_B: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.keys_B is None:
            return x
        keys_B = self.keys_B.to(x.device) ^ self.salt
        keep_BN = rng.keep_mask(keys_B, x[0].numel(), self.drop)
        return x * keep_BN.view(x.shape).to(x.dtype) / (1 - self.drop)


def add(
    network: Any, part: str, config: LoraConfig, seed: int, unused: tuple[str, ...] = ()
) -> None:
    """Add a LoRA to a network (the UNet, or a text encoder), its weights drawn from `seed`.

    The network's own weights are frozen, the LoRA's are float32. Layers named in `unused` get none.
    """
    targets = TEXT if part.startswith("text") else _unet_targets(config)
    alpha: Any = config.alpha or config.rank  # peft takes fractions too, though it names int
    peft_config = PeftConfig(
        r=config.rank,
        lora_alpha=alpha,
        lora_dropout=config.dropout,
        init_lora_weights="gaussian",
        target_modules=list(targets),
        exclude_modules=list(unused) or None,
    )
    network.requires_grad_(False)
    # Drawn on the CPU, so that the same seed gives the same weights on every device.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.key(seed, "adapter", part))
        network.add_adapter(peft_config, adapter_name=NAME)
    for name, layer in _layers(network):
        if config.dropout:
            layer.lora_dropout[NAME] = KeyedDropout(config.dropout, f"{part}.{name}")
        for factor in (layer.lora_A[NAME], layer.lora_B[NAME]):
            factor.to(torch.float32)


def set_dropout_keys(network: torch.nn.Module, keys_B: torch.Tensor) -> None:
    """Set the keys of the rows that every dropout layer sees next."""
    for module in network.modules():
        if isinstance(module, KeyedDropout):
            module.keys_B = keys_B


@contextmanager
def disabled(network: torch.nn.Module) -> Generator[None]:
    """Within this context the network behaves as before training."""
    layers = [layer for _, layer in _layers(network)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def state(network: Any) -> dict[str, torch.Tensor]:
    """The LoRA's matrices by peft's names."""
    tensors: dict[str, torch.Tensor] = get_peft_model_state_dict(network, adapter_name=NAME)
    return tensors


def _unet_targets(config: LoraConfig) -> tuple[str, ...]:
    return ATTENTION if config.targets == "attention" else ATTENTION + FEED_FORWARD


def _layers(network: torch.nn.Module) -> list[tuple[str, Any]]:
    return [(n, m) for n, m in network.named_modules() if hasattr(m, "lora_dropout")]
