"""Adapters on the networks that are tuned: LoRA and its kin, added, switched off and read again.

Owns which layers get one, and reproducible dropout. peft owns the arithmetic.
"""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoHaConfig, LoKrConfig, get_peft_model_state_dict
from peft import LoraConfig as PeftLoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer

from rayjobs.dreambooth.config import LoraConfig
from rayjobs.dreambooth.data import rng

NAME = "default"
ATTENTION = ("to_k", "to_q", "to_v", "to_out.0")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
CONVOLUTION = ("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv")
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
    """Add an adapter to a network (the UNet, or a text encoder), its weights drawn from `seed`.

    The network's own weights are frozen, the adapter's are float32. Layers named in `unused` get
    none.
    """
    peft_config = _peft_config(part, config, unused)
    network.requires_grad_(False)
    # Drawn on the CPU, so that the same seed gives the same weights on every device.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.key(seed, "adapter", part))
        network.add_adapter(peft_config, adapter_name=NAME)
    for name, layer in _layers(network):
        if config.dropout:
            layer.lora_dropout[NAME] = KeyedDropout(config.dropout, f"{part}.{name}")
        for parameter in _own_parameters(layer):
            parameter.data = parameter.data.float()


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
    """The adapter's tensors by peft's names."""
    tensors: dict[str, torch.Tensor] = get_peft_model_state_dict(network, adapter_name=NAME)
    return tensors


def strengths(network: torch.nn.Module) -> dict[str, tuple[int, float]]:
    """Rank and alpha of each layer's part of the adapter."""
    return {
        name: (layer.r[NAME], (layer.alpha if hasattr(layer, "alpha") else layer.lora_alpha)[NAME])
        for name, layer in _layers(network)
    }


def _peft_config(part: str, config: LoraConfig, unused: tuple[str, ...]) -> Any:
    of_text = part.startswith("text")
    targets = TEXT if of_text else _unet_targets(config)
    alpha: Any = config.alpha or config.rank  # peft takes fractions too, though it names int
    conv_rank = config.conv_rank or config.rank
    patterns: dict[str, Any] = {}
    if not of_text and conv_rank != config.rank:
        strength = alpha / config.rank
        patterns["rank_pattern"] = dict.fromkeys(CONVOLUTION, conv_rank)
        patterns["alpha_pattern"] = dict.fromkeys(CONVOLUTION, strength * conv_rank)
    layers: dict[str, Any] = {
        "r": config.rank,
        "target_modules": list(targets),
        "exclude_modules": list(unused) or None,
        **patterns,
    }
    if config.kind == "loha":
        return LoHaConfig(alpha=alpha, **layers)
    if config.kind == "lokr":
        return LoKrConfig(alpha=alpha, decompose_factor=config.factor, **layers)
    return PeftLoraConfig(
        lora_alpha=alpha,
        lora_dropout=config.dropout,
        init_lora_weights="gaussian",
        use_dora=config.kind == "dora",
        **layers,
    )


def _unet_targets(config: LoraConfig) -> tuple[str, ...]:
    more = {"attention": (), "transformer": FEED_FORWARD, "convolution": FEED_FORWARD + CONVOLUTION}
    return ATTENTION + more[config.targets]


def _layers(network: torch.nn.Module) -> list[tuple[str, Any]]:
    return [(n, m) for n, m in network.named_modules() if isinstance(m, BaseTunerLayer)]


def _own_parameters(layer: Any) -> list[torch.nn.Parameter]:
    return [p for name, p in layer.named_parameters() if not name.startswith("base_layer.")]
