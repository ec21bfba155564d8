"""One layer with the adapters of the rows in a call.

Owns the gathered low-rank products, by which every slot has its own adapters in two operations, and
the other kinds, one operation for each adapter in the call. Knows no files. Legend: P slots,
K adapters of a row, R rank, T tokens, I in, O out.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from rayjobs.diffusion.adapters.change import Change
from rayjobs.diffusion.adapters.deltas import LowRank, layer_output


@dataclass(frozen=True)
class Group:
    """The slots of a call that use an adapter at one scale; `slots` None are all of them."""

    number: int
    scale: float
    slots: torch.Tensor | None

    def pick(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self.slots is None else tensor[self.slots]

    def add(self, tensor: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
        """`tensor` plus a change of these slots; the others keep their bits."""
        return tensor + change if self.slots is None else tensor.index_add(0, self.slots, change)


@dataclass(frozen=True)
class Uses:
    """The adapters of a call: numbers and scales (P, K), and by adapter those of other kinds."""

    numbers_PK: torch.Tensor
    scales_PK: torch.Tensor
    groups: tuple[Group, ...]


class AdaptedLayer:
    """A layer's changes by adapter: low-rank ones stacked and padded with zeros to one rank."""

    def __init__(self, module: Any):
        self.module = module
        self.down = module.weight.new_zeros(1, 0, *module.weight.shape[1:])  # (N, R, I...)
        self.up = module.weight.new_zeros(1, module.weight.shape[0], 0)  # (N, O, R)
        self.changes: dict[int, _PlacedChange] = {}

    @property
    def num_bytes(self) -> int:
        others = sum(change.num_bytes for change in list(self.changes.values()))
        return self.down.nbytes + self.up.nbytes + others

    def put(self, number: int, change: Change) -> None:
        low_rank = change.low_rank
        if low_rank is None:
            self.changes[number] = _PlacedChange(self.module, change)
        else:
            self._stack(number, low_rank)

    def clear(self, number: int) -> None:
        self.changes.pop(number, None)
        if number < len(self.down):
            self.down[number], self.up[number] = 0, 0

    def add(self, x: torch.Tensor, y: torch.Tensor, uses: Uses) -> torch.Tensor:
        """`y`, the layer's output for `x`, plus what each slot's adapters add."""
        changed = y
        if self.down.shape[1]:
            changed = self._add_low_rank(x, y, uses.numbers_PK, uses.scales_PK)
        for group in uses.groups:
            if change := self.changes.get(group.number):
                added = change.output(group.pick(x), group.pick(y), group.scale)
                changed = group.add(changed, added)
        return changed

    def _stack(self, number: int, delta: LowRank) -> None:
        down, up = delta.down, delta.scaled_up()
        num = max(number + 1, len(self.down))
        rank = max(len(down), self.down.shape[1])
        downs = self.down.new_zeros(num, rank, *self.down.shape[2:])
        ups = self.up.new_zeros(num, self.up.shape[1], rank)
        downs[: len(self.down), : self.down.shape[1]] = self.down
        ups[: len(self.up), :, : self.up.shape[2]] = self.up
        downs[number, : len(down)] = down.to(downs)
        ups[number, :, : up.shape[1]] = up.to(ups)
        self.down, self.up = downs, ups

    def _add_low_rank(
        self, x: torch.Tensor, y: torch.Tensor, numbers_PK: torch.Tensor, scales_PK: torch.Tensor
    ) -> torch.Tensor:
        known = numbers_PK < len(self.down)  # later adapters do not touch this layer
        numbers_PK = numbers_PK * known
        down = self.down[numbers_PK].flatten(1, 2)  # (P, K R, I...)
        up_POR = self.up[numbers_PK].transpose(1, 2).flatten(2)  # (P, O, K R)
        rank = self.down.shape[1]
        scale_PR = (scales_PK * known).repeat_interleave(rank, dim=1).to(y.dtype)
        up_PRO = up_POR.transpose(1, 2) * scale_PR[:, :, None]
        # Products first, then the sum: adding exact zeros keeps the bits of a row without adapters.
        if isinstance(self.module, torch.nn.Conv2d):
            h_PRT = _grouped_conv(x, down, self.module).flatten(2)
            return y + torch.bmm(up_PRO.transpose(1, 2), h_PRT).view(y.shape)
        h_PTR = torch.bmm(x.reshape(len(x), -1, x.shape[-1]), down.transpose(1, 2))
        return y + torch.bmm(h_PTR, up_PRO).view(y.shape)


class _PlacedChange:
    """A change beside its layer, on its device."""

    def __init__(self, module: Any, change: Change):
        self.module = module
        weight = module.weight
        self.deltas = [delta.to(weight) for delta in change.deltas]
        bias = change.bias
        if change.whole_bias is not None:
            own = 0.0 if module.bias is None else module.bias.detach().float().cpu()
            bias = change.whole_bias - own + (0.0 if bias is None else bias)
        self.bias = None if bias is None else bias.to(weight)
        self.lengths = None if change.magnitude is None else _Lengths(weight, change)

    @property
    def num_bytes(self) -> int:
        bias = 0 if self.bias is None else self.bias.nbytes
        return sum(delta.nbytes for delta in self.deltas) + bias

    def output(self, x: torch.Tensor, y: torch.Tensor, scale: float) -> torch.Tensor:
        """What it adds to the layer's own output `y` for `x`."""
        added = torch.zeros_like(y)
        if self.lengths is None:
            added = added + scale * self._product(x, y)
        else:
            gain = self.lengths.gain(scale).to(y.dtype)
            if self.lengths.of_columns:
                gain = _on_channels(gain, x)
                added = layer_output(self.module, x * (gain - 1), self.module.weight)
                added = added + scale * self._product(x * gain, y)
            else:
                gain = _on_channels(gain, y)
                own = y if self.module.bias is None else y - _on_channels(self.module.bias, y)
                added = (gain - 1) * own + gain * (scale * self._product(x, y))
        if self.bias is not None:
            added = added + scale * _on_channels(self.bias, y)
        return added

    def _product(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        product = torch.zeros_like(y)
        for delta in self.deltas:
            product = product + delta.apply(self.module, x)
        return product


class _Lengths:
    """A DoRA's magnitude over the length of the changed weight, at any scale.

    The weight W + s D has rows of squared length |W|^2 + 2 s <W, D> + s^2 |D|^2: three vectors,
    found once for each adapter.
    """

    def __init__(self, weight: torch.Tensor, change: Change):
        self.of_columns = change.of_columns
        assert change.magnitude is not None
        self.magnitude = change.magnitude.to(weight.device)
        own = weight.detach().float()
        delta = torch.stack([d.weight(weight.shape) for d in change.deltas]).sum(0).to(own)
        axis = 1 if self.of_columns else 0
        rest = [n for n in range(own.ndim) if n != axis]
        self.own, self.cross, self.added = (
            product.double().sum(rest).float()
            for product in (own * own, own * delta, delta * delta)
        )

    def gain(self, scale: float) -> torch.Tensor:
        squared = self.own + 2 * scale * self.cross + scale * scale * self.added
        return self.magnitude / squared.clamp_min(torch.finfo(torch.float32).tiny).sqrt()


def _on_channels(vector: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A vector over channels, to be multiplied with (P, C, H, W) or (P, ..., C)."""
    return vector.view(-1, 1, 1) if like.ndim == 4 else vector


def _grouped_conv(x: torch.Tensor, down: torch.Tensor, module: torch.nn.Conv2d) -> torch.Tensor:
    """Each slot convolved with its own kernels: slots become groups of one call."""
    slots, rank = down.shape[:2]
    x = x.reshape(1, -1, *x.shape[2:])
    h = F.conv2d(x, down.flatten(0, 1), None, module.stride, module.padding, groups=slots)
    return h.view(slots, rank, *h.shape[2:])
