"""One layer with the adapters of the rows in a call.

Owns the low-rank products, by which every slot has its own adapters in two operations, and the
other kinds, one operation for each adapter in the call. Knows neither files nor where factors come
from. Legend: P slots, G groups of slots that use the same, W ranks of a row's adapters, T tokens of
a group, I in, O out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from rayjobs.diffusion.adapters.change import Change
from rayjobs.diffusion.adapters.deltas import Delta, layer_output


@dataclass(frozen=True)
class Group:
    """The slots of a call that use an adapter at one scale; `slots` None are all of them."""

    scale: float
    slots: torch.Tensor | None

    def pick(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self.slots is None else tensor[self.slots]

    def add(self, tensor: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
        """`tensor` plus a change of these slots; the others keep their bits."""
        return tensor + change if self.slots is None else tensor.index_add(0, self.slots, change)


@dataclass(eq=False)
class Use:
    """What a call adds at a layer."""

    factors: dict[str, torch.Tensor] = field(default_factory=dict)
    """Empty, or low-rank factors times their scales: `down` (G, W, I), `up` (G, O, W)."""
    late: Callable[[], tuple[torch.Tensor, torch.Tensor]] | None = None
    """Gathers them where there was no room for those of all layers."""
    changes: "list[tuple[Group, PlacedChange]]" = field(default_factory=list)
    """What is no plain low-rank factors."""


class AdaptedLayer:
    """A layer and what the call that is made now adds to it.

    `exact` takes sums after products, in the order in which data sets were made.
    """

    def __init__(self, module: Any, *, exact: bool):
        self.module = module
        self.exact = exact
        self.use: Use | None = None

    def add(self, x: torch.Tensor, y: torch.Tensor, use: Use) -> torch.Tensor:
        """`y`, the layer's output for `x`, plus what each slot's adapters add."""
        changed = y
        if use.factors:
            changed = self._add_low_rank(x, y, use.factors["down"], use.factors["up"])
        elif use.late is not None:
            changed = self._add_low_rank(x, y, *use.late())
        for group, change in use.changes:
            added = change.output(group.pick(x), group.pick(y), group.scale)
            changed = group.add(changed, added)
        return changed

    def _add_low_rank(
        self, x: torch.Tensor, y: torch.Tensor, down: torch.Tensor, up_GOW: torch.Tensor
    ) -> torch.Tensor:
        # Sizes by their names, not by len(), which is a constant in a recording.
        if isinstance(self.module, torch.nn.Conv2d):
            times = x.shape[0] // down.shape[0]
            h_PWT = _grouped_conv(x, down.repeat_interleave(times, 0), self.module).flatten(2)
            return y + torch.bmm(up_GOW.repeat_interleave(times, 0), h_PWT).view(y.shape)
        num = down.shape[0]
        h_GTW = torch.bmm(x.reshape(num, -1, x.shape[-1]), down.transpose(1, 2))
        up_GWO = up_GOW.transpose(1, 2)
        if self.exact:
            return y + torch.bmm(h_GTW, up_GWO).view(y.shape)
        return torch.baddbmm(y.reshape(num, -1, y.shape[-1]), h_GTW, up_GWO).view(y.shape)


class PlacedChange:
    """A change beside its layer, with deltas on the layer's device and in its dtype."""

    def __init__(self, module: Any, change: Change, deltas: list[Delta]):
        self.module = module
        self.deltas = deltas
        weight, bias = module.weight, change.bias
        if change.whole_bias is not None:
            own = 0.0 if module.bias is None else module.bias.detach().float().cpu()
            bias = change.whole_bias - own + (0.0 if bias is None else bias)
        self.bias = None if bias is None else bias.to(weight)
        self.lengths = None if change.magnitude is None else _Lengths(weight, change)

    @property
    def vectors(self) -> list[torch.Tensor]:
        """What it holds beside its deltas."""
        lengths = [] if self.lengths is None else self.lengths.vectors
        return lengths if self.bias is None else [self.bias, *lengths]

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

    @property
    def vectors(self) -> list[torch.Tensor]:
        return [self.magnitude, self.own, self.cross, self.added]

    def on_weight(self, gain: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        axis = 1 if self.of_columns else 0
        return weight * gain.view([-1 if n == axis else 1 for n in range(weight.ndim)])

    def gain(self, scale: float) -> torch.Tensor:
        squared = self.own + 2 * scale * self.cross + scale * scale * self.added
        return self.magnitude / squared.clamp_min(torch.finfo(torch.float32).tiny).sqrt()


def changed_weight(
    module: Any, changes: Sequence[tuple[Change, float]]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A layer's weight and bias with changes at their scales, each of the layer's own weight."""
    own, bias = module.weight.detach().float(), module.bias
    weight = own
    total = None if bias is None else bias.detach().float()
    for change, scale in changes:
        placed = PlacedChange(module, change, [])
        delta = torch.zeros_like(own)
        for each in change.deltas:
            delta = delta + scale * each.weight(own.shape).to(own)
        if placed.lengths is not None:
            delta = placed.lengths.on_weight(placed.lengths.gain(scale), own + delta) - own
        weight = weight + delta
        if placed.bias is not None:
            total = scale * placed.bias.float() + (0.0 if total is None else total)
    return weight.to(module.weight), None if total is None else total.to(module.weight)


def _on_channels(vector: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A vector over channels, to be multiplied with (P, C, H, W) or (P, ..., C)."""
    return vector.view(-1, 1, 1) if like.ndim == 4 else vector


def _grouped_conv(x: torch.Tensor, down: torch.Tensor, module: torch.nn.Conv2d) -> torch.Tensor:
    """Each slot convolved with its own kernels: slots become groups of one call."""
    slots, rank = down.shape[:2]
    x = x.reshape(1, -1, *x.shape[2:])
    h = F.conv2d(x, down.flatten(0, 1), None, module.stride, module.padding, groups=slots)
    return h.view(slots, rank, *h.shape[2:])
