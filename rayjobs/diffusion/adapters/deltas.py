"""What an adapter adds to a layer's weight: low-rank factors, a Kronecker or a Hadamard product, or
a plain difference.

Owns their arithmetic. Each is held by its factors, however large the product, and adds `delta(x)`
to the layer's output. Knows neither files nor rows. Legend: O out, I in, k kernel (k k, or nothing
for a linear layer), R rank, P slots, T tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, Self

import torch
import torch.nn.functional as F


class Delta(Protocol):
    """A change of a weight (O, I, k) at scale 1."""

    def weight(self, shape: tuple[int, ...]) -> torch.Tensor:
        """The change itself, of `shape`."""

    def apply(self, module: Any, x: torch.Tensor) -> torch.Tensor:
        """What it adds to the output of `module` for the input `x` (P, T, I) or (P, I, H, W)."""

    @property
    def tensors(self) -> list[torch.Tensor]: ...

    def filled(self, tensors: Iterator[torch.Tensor]) -> Self:
        """The same of the next tensors, in place of its own."""


@dataclass(frozen=True)
class _Factors:
    """Tensors that move together."""

    @property
    def tensors(self) -> list[torch.Tensor]:
        return list(self._named().values())

    def filled(self, tensors: Iterator[torch.Tensor]) -> Self:
        return replace(self, **{name: next(tensors) for name in self._named()})

    def _named(self) -> dict[str, torch.Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


@dataclass(frozen=True)
class LowRank(_Factors):
    """`strength` times up (O, R) down (R, I, k): LoRA (arXiv 2106.09685, eq. 3)."""

    down: torch.Tensor
    up: torch.Tensor
    strength: float = 1.0

    def scaled_up(self) -> torch.Tensor:
        return self.up.float() * self.strength

    def weight(self, shape: tuple[int, ...]) -> torch.Tensor:
        return (self.scaled_up() @ self.down.float().flatten(1)).view(shape)

    def apply(self, module: Any, x: torch.Tensor) -> torch.Tensor:
        up = self.scaled_up().to(x.dtype)
        h = layer_output(module, x, self.down)
        return F.conv2d(h, up[:, :, None, None]) if x.ndim == 4 else h @ up.T


@dataclass(frozen=True)
class Kronecker(_Factors):
    """`strength` times the Kronecker product of left (O1, I1) and right (O2, I2, k): LoKr
    (arXiv 2309.14859)."""

    left: torch.Tensor
    right: torch.Tensor
    strength: float = 1.0

    def weight(self, shape: tuple[int, ...]) -> torch.Tensor:
        product = torch.kron(self.left.float(), self.right.float().flatten(1))
        return (product * self.strength).view(shape)

    def apply(self, module: Any, x: torch.Tensor) -> torch.Tensor:
        """Without the product: kron(A, B) x is A X B^T for x as a matrix X (I1, I2)."""
        num_left, num_inputs = len(self.left), self.left.shape[1]
        left = self.left * self.strength
        if x.ndim == 4:
            h = layer_output(
                module, x.reshape(-1, x.shape[1] // num_inputs, *x.shape[2:]), self.right
            )
            y = left @ h.reshape(len(x), num_inputs, -1)
            return y.view(len(x), num_left * len(self.right), *h.shape[2:])
        h = x.unflatten(-1, (num_inputs, -1)) @ self.right.T
        return (left @ h).flatten(-2)


@dataclass(frozen=True)
class Hadamard(_Factors):
    """`strength` times the elementwise product of two low-rank matrices (O, I k): LoHa
    (arXiv 2108.06098). With cores (R, R, k) these are Tucker products of a (R, O), core, b (R, I).
    """

    a1: torch.Tensor
    b1: torch.Tensor
    a2: torch.Tensor
    b2: torch.Tensor
    core1: torch.Tensor | None = None
    core2: torch.Tensor | None = None
    strength: float = 1.0

    def weight(self, shape: tuple[int, ...]) -> torch.Tensor:
        return self._product(torch.float32).view(shape)

    def apply(self, module: Any, x: torch.Tensor) -> torch.Tensor:
        """By way of the weight, which takes R / T of the layer's own work to make."""
        return layer_output(module, x, self._product(x.dtype).view(module.weight.shape))

    def _product(self, dtype: torch.dtype) -> torch.Tensor:
        one = _two_factors(self.a1, self.b1, self.core1, dtype)
        two = _two_factors(self.a2, self.b2, self.core2, dtype)
        return one * two * self.strength


@dataclass(frozen=True)
class Difference(_Factors):
    """A difference (O, I, k) as it is; of a norm layer, (C,)."""

    value: torch.Tensor

    def weight(self, shape: tuple[int, ...]) -> torch.Tensor:
        return self.value.float().view(shape)

    def apply(self, module: Any, x: torch.Tensor) -> torch.Tensor:
        return layer_output(module, x, self.value)


def tucker(core: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The weight (O, I, k, k) of a core (R, R, k, k) and its sides a (R, O) and b (R, I)."""
    return torch.einsum("ijkl,ip,jr->prkl", core, a, b)


def layer_output(module: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """What `module` would give for `x` with `weight` and no bias.

    A linear layer's slots are one product each: their bits do not depend on how many there are.
    """
    if isinstance(module, torch.nn.Conv2d):
        return F.conv2d(x, weight, None, module.stride, module.padding, module.dilation)
    if isinstance(module, torch.nn.GroupNorm):
        normal = F.group_norm(x, module.num_groups, None, None, module.eps)
        return normal * weight.view(-1, *[1] * (x.ndim - 2))
    if isinstance(module, torch.nn.LayerNorm):
        return F.layer_norm(x, module.normalized_shape, None, None, module.eps) * weight
    slots = x.reshape(len(x), -1, x.shape[-1])
    y = torch.bmm(slots, weight.T.expand(len(x), -1, -1))
    return y.view(*x.shape[:-1], len(weight))


def _two_factors(
    a: torch.Tensor, b: torch.Tensor, core: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    a, b = a.to(dtype), b.to(dtype)
    return a @ b if core is None else tucker(core.to(dtype), a, b)
