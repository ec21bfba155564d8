"""Every adapter format that tools write: right to the formula in a mixed batch, or refused."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from rayjobs.diffusion.adapters.bank import LoraBank
from rayjobs.diffusion.model import Model
from tests.diffusion.adapters import formats
from tests.diffusion.adapters.formats import CONV, FORMATS, QUERY, Made, kohya, merged, random


@pytest.fixture
def bank(tiny: Model) -> Iterator[LoraBank]:
    bank = LoraBank(tiny)
    yield bank
    bank.detach()


def of(model: Model) -> dict[tuple[str, str], Any]:
    encoders = zip(("text_encoder", "text_encoder_2"), model.text_encoders, strict=False)
    parts = {"unet": model.unet, **dict(encoders)}
    return {(part, name): m for part, root in parts.items() for name, m in root.named_modules()}


def make(model: Model, kind: Callable[[Made], None], seed: int = 0) -> Made:
    torch.manual_seed(seed)
    made = Made(of(model))
    kind(made)
    return made


def write(made: Made, folder: Path, name: str = "adapter.safetensors") -> str:
    if made.config is not None:
        folder = folder / "peft"
        folder.mkdir()
        (folder / "adapter_config.json").write_text(formats.json.dumps(made.config))
        name = "adapter_model.safetensors"
    save_file(made.tensors, folder / name, made.header or None)
    return str(folder if made.config is not None else folder / name)


@torch.no_grad()
@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.__name__)
def test_a_format_is_right_in_a_mixed_batch(
    kind: Callable[[Made], None], tiny: Model, bank: LoraBank, tmp_path: Path
) -> None:
    """Alone at 1 and at 0.5, beside another adapter, and none, each slot as by its formula."""
    first = make(tiny, kind)
    second = make(tiny, formats.kohya_every_outer_layer, seed=1)
    for layer in first.weights.keys() | first.biases.keys():  # a neighbour on the same layers
        weight = first.modules[layer].weight
        if weight.ndim > 1 and layer not in second.weights:
            formats.put_kohya(second, layer[1], _name(*layer), part=layer[0])
    a = bank.load(write(first, tmp_path))
    b = bank.load(write(second, tmp_path, "second.safetensors"))
    uses = [((a, 1.0),), (), ((a, 0.5), (b, 2.0)), ((b, 1.0),)]
    assert first.weights
    for part, name in first.weights.keys() | first.biases.keys():
        module = first.modules[part, name]
        x = _input(module, len(uses))
        with bank.applied(uses):
            outputs = module(x)
        for slot, use in enumerate(uses):
            scales = dict(use)
            weight, bias = module.weight, module.bias
            for made, sha256 in ((first, a), (second, b)):
                if sha256 in scales and (part, name) in made.weights:
                    changed = made.weights[part, name](scales[sha256])
                    weight = weight + (changed - module.weight)
                if sha256 in scales and (part, name) in made.biases:
                    bias = made.biases[part, name](scales[sha256])
            expected = merged(module, weight, bias, x[slot : slot + 1])
            assert (outputs[slot : slot + 1] - expected).abs().max() <= 1e-4, (name, slot)
        plain = module(x)
        assert (outputs[0] - plain[0]).abs().max() > 1e-3, f"{name} is not changed"
        assert torch.equal(outputs[1], plain[1])


def _name(part: str, layer: str) -> str:
    prefix = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
    return prefix[part] + layer.replace(".", "_")


def _input(module: Any, num: int) -> torch.Tensor:
    torch.manual_seed(2)
    if isinstance(module, torch.nn.Conv2d):
        return torch.randn(num, module.in_channels, 6, 6)
    if isinstance(module, torch.nn.GroupNorm):
        return torch.randn(num, module.num_channels, 6, 6)
    size = module.weight.shape[-1]
    return torch.randn(num, 5, size)
