"""Low-rank factors of many layers in one buffer: those of an adapter, and those of a call's slots.

Owns where in a buffer a layer's factors lie, and the gathering of what the slots of a call use.
Knows neither files nor hooks. Legend: G groups of slots that use the same, K adapters of a row,
R rank, W = K R, I in, O out.
"""

import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from rayjobs.diffusion.adapters.deltas import LowRank
from rayjobs.diffusion.adapters.names import Layer

ALIGNMENT = 64
"""Elements: a layer's factors begin where a vector register may."""

Factors = tuple[torch.Tensor, torch.Tensor]
"""A layer's down (..., R, I) and up (..., O, R)."""
Row = tuple[tuple["Block | None", float], ...]
"""What a group of slots uses, in order: factors and scales; None where it has no factors."""


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the factors of layers lie, by their ranks: all down factors, then all up factors."""

    ranks: Mapping[Layer, int]

    @staticmethod
    def of(ranks: Mapping[Layer, int]) -> "Layout":
        """In the one order that all layouts have."""
        return Layout(dict(sorted(ranks.items(), key=lambda item: str(item[0]))))

    @cached_property
    def num_down(self) -> int:
        """Elements before the up factors."""
        return _end(self._downs)

    @cached_property
    def size(self) -> int:
        """Elements in all."""
        return self.num_down + _end(self._ups)

    @cached_property
    def layers(self) -> str:
        """Stands for the layers."""
        return _digest(map(str, self.ranks))

    @cached_property
    def shapes(self) -> str:
        """Stands for the layers and their ranks."""
        return _digest(f"{layer} {rank}" for layer, rank in self.ranks.items())

    def views(self, buffer: torch.Tensor) -> dict[Layer, Factors]:
        """The factors in a buffer (..., size)."""
        downs = _split(buffer[..., : self.num_down], self._downs)
        ups = _split(buffer[..., self.num_down :], self._ups)
        return {
            layer: (down.unflatten(-1, (rank, *layer.shape[1:])), up.unflatten(-1, (-1, rank)))
            for (layer, rank), down, up in zip(self.ranks.items(), downs, ups, strict=True)
        }

    @cached_property
    def _downs(self) -> list[int]:
        return [rank * math.prod(layer.shape[1:]) for layer, rank in self.ranks.items()]

    @cached_property
    def _ups(self) -> list[int]:
        return [rank * layer.shape[0] for layer, rank in self.ranks.items()]


@dataclass(frozen=True, eq=False)
class Block:
    """The low-rank factors of an adapter for one part of a model."""

    layout: Layout
    buffer: torch.Tensor

    @cached_property
    def views(self) -> dict[Layer, Factors]:
        return self.layout.views(self.buffer)

    def fill(self, deltas: Mapping[Layer, LowRank]) -> None:
        for layer, (down, up) in self.views.items():
            down.copy_(deltas[layer].down)
            up.copy_(deltas[layer].scaled_up())


class Gathering:
    """The factors that groups of slots use, of one part of a model, padded with zeros.

    A row without an adapter has zeros, which leave its bits as they are. Where not `exact`, ranks
    are rounded up to powers of two, so that calls have few shapes.
    """

    def __init__(self, rows: Sequence[Row], *, exact: bool):
        self.rows = rows
        self.width = max(map(len, rows))
        blocks = {id(block): block for row in rows for block, _ in row if block is not None}
        ranks: dict[Layer, int] = {}
        for block in blocks.values():
            for layer, rank in block.layout.ranks.items():
                ranks[layer] = max(rank, ranks.get(layer, 0))
        self.ranks = ranks if exact else {layer: _bucket(rank) for layer, rank in ranks.items()}
        self.layout = self._layout(self.ranks)
        self._like = next((block.buffer for block in blocks.values()), None)

    @property
    def num_bytes(self) -> int:
        item = 0 if self._like is None else self._like.itemsize
        return len(self.rows) * self.layout.size * item

    def all_factors(self) -> dict[Layer, Factors]:
        """The factors (G, W, I) and (G, O, W) of all layers, in one buffer."""
        return self._gather(self.layout)

    def factors_of(self, layer: Layer) -> Factors:
        """The same of one layer, which the others need not wait in memory for."""
        return self._gather(self._layout({layer: self.ranks[layer]}))[layer]

    def _layout(self, ranks: Mapping[Layer, int]) -> Layout:
        return Layout.of({layer: self.width * rank for layer, rank in ranks.items()})

    def _gather(self, layout: Layout) -> dict[Layer, Factors]:
        if self._like is None:
            return {}
        buffer = self._like.new_empty(len(self.rows), layout.size)
        first: dict[Row, int] = {}
        for number, row in enumerate(self.rows):
            if row in first:
                buffer[number] = buffer[first[row]]
                continue
            first[row] = number
            self._fill(row, layout, buffer[number])
        return layout.views(buffer)

    def _fill(self, row: Row, layout: Layout, buffer: torch.Tensor) -> None:
        """A row's factors: at once where one adapter's lie as they are to."""
        if len(row) == 1 and row[0][0] is not None and row[0][0].layout.shapes == layout.shapes:
            own, scale, num_down = row[0][0].buffer, row[0][1], layout.num_down
            buffer[:num_down] = own[:num_down]
            torch.mul(own[num_down:], _rounded(scale, own.dtype), out=buffer[num_down:])
            return
        buffer.zero_()
        for position, (block, scale) in enumerate(row):
            if block is not None:
                self._put(block, scale, layout, position, buffer)

    def _put(
        self, block: Block, scale: float, layout: Layout, position: int, buffer: torch.Tensor
    ) -> None:
        """An adapter's factors at its position of a row."""
        mine, into = block.views, layout.views(buffer)
        shared = [layer for layer in layout.ranks if layer in mine]
        if not shared:
            return
        downs, ups = [], []
        for layer in shared:
            first = position * self.ranks[layer]
            end = first + block.layout.ranks[layer]
            downs.append(into[layer][0][first:end])
            ups.append(into[layer][1][:, first:end])
        rounded = _rounded(scale, buffer.dtype)
        scaled = torch._foreach_mul([mine[layer][1] for layer in shared], rounded)
        torch._foreach_copy_(downs, [mine[layer][0] for layer in shared])
        torch._foreach_copy_(ups, scaled)


def _rounded(scale: float, dtype: torch.dtype) -> float:
    """As the dtype has it: the product with a tensor is then that of two such tensors."""
    return float(torch.tensor(scale, dtype=torch.float32).to(dtype))


def _bucket(rank: int) -> int:
    return 1 << (rank - 1).bit_length()


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _end(sizes: Iterable[int]) -> int:
    return sum(map(aligned, sizes))


def _split(buffer: torch.Tensor, sizes: Sequence[int]) -> Iterator[torch.Tensor]:
    starts = itertools.accumulate(map(aligned, sizes), initial=0)
    for start, size in zip(starts, sizes, strict=False):
        yield buffer[..., start : start + size]


def split(buffer: torch.Tensor, like: Sequence[torch.Tensor]) -> list[Any]:
    """Parts of a buffer (size,) of the shapes of other tensors."""
    parts = _split(buffer, [tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]


def _digest(names: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(names).encode()).hexdigest()
