"""An adapter on a model's device, ready to be linked between two steps.

Owns the way there, which any thread may go: one buffer for all tensors, one copy. Knows neither
rows nor hooks.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from rayjobs.diffusion.adapters.change import Change
from rayjobs.diffusion.adapters.deltas import LowRank
from rayjobs.diffusion.adapters.layer import PlacedChange
from rayjobs.diffusion.adapters.names import Layer
from rayjobs.diffusion.adapters.packed import Block, Layout, aligned, split
from rayjobs.diffusion.adapters.reader import Adapter


@dataclass(frozen=True, eq=False)
class PlacedAdapter:
    """An adapter's tensors beside the model; `changes` are no plain low-rank factors."""

    adapter: Adapter
    """Without its tensors."""
    layers: tuple[Layer, ...]
    buffer: torch.Tensor
    blocks: Mapping[str, Block]
    """Low-rank factors by part of the model, in the buffer."""
    changes: Mapping[Layer, PlacedChange]
    arrival: Any = None
    """On a GPU the event after which the buffer is filled."""

    @classmethod
    def fused(cls, adapter: Adapter) -> "PlacedAdapter":
        """One whose tensors are in the model's weights."""
        return cls(adapter.without_tensors(), (), torch.empty(0), {}, {})

    @property
    def path(self) -> str:
        return self.adapter.path

    @property
    def sha256(self) -> str:
        return self.adapter.sha256

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors)

    def wait(self) -> None:
        """Let the device, not the host, wait until it is there."""
        if self.arrival is not None:
            stream = torch.cuda.current_stream(self.buffer.device)
            stream.wait_event(self.arrival)
            for tensor in self._tensors:
                tensor.record_stream(stream)

    @property
    def _tensors(self) -> list[torch.Tensor]:
        return [self.buffer, *(t for change in self.changes.values() for t in change.vectors)]


def place(adapter: Adapter, modules: Mapping[Layer, Any], like: torch.Tensor) -> PlacedAdapter:
    """Bring an adapter to the device of `like`, in its dtype.

    To a GPU it goes from pinned memory on a stream of its own, and neither host nor steps wait.
    """
    if not like.is_cuda:
        return _place(adapter, modules, like)
    stream = _upload_stream(like.device)
    with torch.cuda.stream(stream):
        placed = _place(adapter, modules, like)
        return replace(placed, arrival=stream.record_event())


def _place(adapter: Adapter, modules: Mapping[Layer, Any], like: torch.Tensor) -> PlacedAdapter:
    low_rank, others = _low_rank(adapter), _other_tensors(adapter)
    layouts = {part: Layout.of(ranks) for part, ranks in _ranks(low_rank).items()}
    num_factors = sum(layout.size for layout in layouts.values())
    size = num_factors + sum(aligned(tensor.numel()) for tensor in others)
    host = torch.zeros(
        size,
        dtype=like.dtype,
        device="cpu" if like.is_cuda else like.device,
        pin_memory=like.is_cuda,
    )
    for block in _blocks(layouts, host).values():
        block.fill(low_rank)
    for part, tensor in zip(split(host[num_factors:], others), others, strict=True):
        part.copy_(tensor)
    buffer = host.to(like.device, non_blocking=True)
    moved = iter(split(buffer[num_factors:], others))
    changes = {
        layer: PlacedChange(
            modules[layer], change, [delta.filled(moved) for delta in change.deltas]
        )
        for layer, change in _others(adapter)
    }
    blocks = _blocks(layouts, buffer)
    return PlacedAdapter(adapter.without_tensors(), tuple(adapter.changes), buffer, blocks, changes)


def _blocks(layouts: Mapping[str, Layout], buffer: torch.Tensor) -> dict[str, Block]:
    blocks, start = {}, 0
    for part, layout in layouts.items():
        blocks[part] = Block(layout, buffer[start : start + layout.size])
        start += layout.size
    return blocks


def _ranks(low_rank: Mapping[Layer, LowRank]) -> dict[str, dict[Layer, int]]:
    """The ranks of its layers, by part."""
    ranks: dict[str, dict[Layer, int]] = {}
    for layer, delta in low_rank.items():
        ranks.setdefault(layer.part, {})[layer] = len(delta.down)
    return ranks


def _low_rank(adapter: Adapter) -> dict[Layer, LowRank]:
    found = ((layer, change.low_rank) for layer, change in adapter.changes.items())
    return {layer: delta for layer, delta in found if delta is not None}


def _others(adapter: Adapter) -> Iterator[tuple[Layer, Change]]:
    return (it for it in adapter.changes.items() if it[1].low_rank is None)


def _other_tensors(adapter: Adapter) -> list[torch.Tensor]:
    return [t for _, change in _others(adapter) for delta in change.deltas for t in delta.tensors]


@cache
def _upload_stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device)
