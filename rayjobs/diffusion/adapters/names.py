"""From the name that any tool gives a layer to the layer of the model.

Owns prefixes and spellings. Dots and underscores mean the same here: kohya's names are diffusers'
or the original ones with underscores, so that one table serves them all. Knows no tensors.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from rayjobs.diffusion.adapters import ldm

WRAPPERS = re.compile(r"(?:base_model\.model\.|module\.|_orig_mod\.)")
PREFIXES = (
    (
        "text_encoder_2",
        re.compile(
            r"text_encoder_2\.|lora_te2_|(?:text_encoders\.)?clip_g\.(?:transformer\.)?"
            r"|conditioner\.embedders\.1\.(?:transformer\.)?"
        ),
    ),
    (
        "text_encoder",
        re.compile(
            r"text_encoder\.|lora_te1?_|(?:text_encoders\.)?clip_l\.(?:transformer\.)?"
            r"|conditioner\.embedders\.0\.(?:transformer\.)?|cond_stage_model\.transformer\."
        ),
    ),
    ("unet", re.compile(r"unet\.|lora_unet_|lycoris_|(?:model\.)?diffusion_model\.")),
)
FAMILY_OF_PREFIX = {"lora_te_": "sd", "lora_te1_": "sdxl", "lora_te2_": "sdxl"}
"""kohya's names of text encoders, which tell the families apart where the shapes do not."""

BLOCK = re.compile(
    r"(?P<attention>down_blocks\.\d+\.attentions\.\d+)\.transformer_blocks\.(?P<number>\d+)\."
)

KINDS: dict[type, Literal["linear", "conv", "norm"]] = {
    torch.nn.Linear: "linear",
    torch.nn.Conv2d: "conv",
    torch.nn.GroupNorm: "norm",
    torch.nn.LayerNorm: "norm",
}


@dataclass(frozen=True)
class Layer:
    """A layer that an adapter can change; `shape` is its weight's."""

    part: str
    name: str
    kind: Literal["linear", "conv", "norm"]
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.part}.{self.name}"

    def __hash__(self) -> int:
        """Of what is hashed already: adapters have hundreds of layers."""
        return hash((self.part, self.name))


class Layers:
    """The layers of one model's UNet and text encoders, by all their names."""

    def __init__(self, family: str, parts: Mapping[str, Any]):
        self.family = family
        self._tables = {part: _table(part, network) for part, network in parts.items()}

    def find(self, name: str, folder: str = "") -> Layer | None:
        """The layer that a tool calls `name`; None if this model has no such layer.

        peft's names do not tell the part: that is its folder's name, the UNet, or of a model with
        one text encoder either.
        """
        part, rest = split_prefix(name)
        parts = [part] if part is not None else [folder] if folder in self._tables else ["unet"]
        if part is None and folder not in self._tables and len(self._tables) == 2:
            parts = list(self._tables)
        found = (self._tables.get(each, {}).get(_spelled(rest)) for each in parts)
        return next(filter(None, found), None)

    @property
    def of_unet(self) -> Collection[Layer]:
        return self._tables["unet"].values()


def blocks(layers: Iterable[Layer]) -> dict[str, set[int]]:
    """Numbers of the transformer blocks of each attention on the UNet's way down."""
    found: dict[str, set[int]] = {}
    for layer in layers:
        if match := BLOCK.match(layer.name):
            found.setdefault(match["attention"], set()).add(int(match["number"]))
    return found


def size_tells_family(layer: Layer) -> bool:
    """Whether the size of a layer, which reads texts, is that of one family alone."""
    return layer.part == "unet" and layer.name.endswith((".attn2.to_k", ".attn2.to_v"))


def split_prefix(name: str) -> tuple[str | None, str]:
    """The part of the model that a name is for, where it tells that, and the name within it."""
    name = _unwrapped(name)
    for part, prefix in PREFIXES:
        if match := prefix.match(name):
            return part, _unwrapped(name[match.end() :])
    return None, name


def family_of(name: str) -> str | None:
    """The family whose files alone call a layer so; None where both do."""
    name = _unwrapped(name)
    families = [f for prefix, f in FAMILY_OF_PREFIX.items() if name.startswith(prefix)]
    return families[0] if families else None


def _unwrapped(name: str) -> str:
    while match := WRAPPERS.match(name):
        name = name[match.end() :]
    return name


def _spelled(name: str) -> str:
    """A name without what spellings differ in."""
    name = name.replace(".processor.", ".").removeprefix("text_model.")
    return name.replace(".", "_").removeprefix("text_model_")


def _table(part: str, network: Any) -> dict[str, Layer]:
    layers = [
        Layer(part, name, kind, tuple(module.weight.shape))
        for name, module in network.named_modules()
        if (kind := KINDS.get(type(module))) and module.weight is not None
    ]
    blocks = ldm.block_names(network) if part == "unet" else {}
    table: dict[str, Layer] = {}
    for layer in layers:
        names = [layer.name, ldm.original_name(layer.name, blocks) if blocks else None]
        for name in filter(None, names):
            table[_spelled(name)] = layer
            if name.endswith(".to_out.0"):  # as diffusers' attention processors had it
                table[_spelled(name.removesuffix(".0"))] = layer
        if part != "unet":
            older = re.sub(r"\.(q|k|v|out)_proj$", r".to_\1", layer.name)
            table[_spelled(older)] = layer
    return table
