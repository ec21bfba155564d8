"""What the tensors of one layer in an adapter file mean, by format.

Owns the formats: which tensors belong together, their shapes and their strength. Every tensor is
taken, or the layer is refused. Knows neither keys nor files. Legend as in `deltas`.
"""

import math
from dataclasses import dataclass

import torch

from rayjobs.diffusion.adapters.deltas import (
    Delta,
    Difference,
    Hadamard,
    Kronecker,
    LowRank,
    tucker,
)
from rayjobs.diffusion.adapters.names import Layer
from rayjobs.diffusion.adapters.notes import Notes


@dataclass(frozen=True)
class Change:
    """What an adapter does to a layer: deltas of its weight and a difference of its bias (O,).

    `magnitude` makes it a DoRA (arXiv 2402.09353): the length of each row of the changed weight
    (O,), or of each column (I,) where `of_columns`. `whole_bias` is a bias in place of the layer's.
    """

    deltas: tuple[Delta, ...] = ()
    bias: torch.Tensor | None = None
    whole_bias: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None
    of_columns: bool = False

    @property
    def low_rank(self) -> LowRank | None:
        """The only delta, where that is all and it is low-rank."""
        others = (self.bias, self.whole_bias, self.magnitude)
        if len(self.deltas) == 1 and all(other is None for other in others):
            delta = self.deltas[0]
            return delta if isinstance(delta, LowRank) else None
        return None


def read_change(layer: Layer, given: dict[str, torch.Tensor], told: Notes) -> Change:
    """What the tensors of one layer mean; takes each from `given`, and leaves none."""
    reader = _LayerReader(layer, given, told)
    deltas = [
        delta
        for delta in (reader.low_rank(), reader.hadamard(), reader.kronecker(), reader.difference())
        if delta is not None
    ]
    magnitude, of_columns = reader.magnitude()
    if deltas and magnitude is None and told.needs_magnitude(layer.part):
        raise ValueError("its magnitude is missing, which use_dora in the settings promises")
    change = Change(
        deltas=tuple(deltas),
        bias=reader.bias(),
        whole_bias=reader.vector("bias"),
        magnitude=magnitude,
        of_columns=of_columns,
    )
    if given:
        raise ValueError(f"its {sorted(given)[0]} stands alone: what it belongs to is missing")
    if not deltas and change.bias is None and change.whole_bias is None:
        raise ValueError("its factors are missing: the file is not whole")
    return change


class _LayerReader:
    """Takes the tensors of one layer, by format; what it takes it removes from `given`."""

    def __init__(self, layer: Layer, given: dict[str, torch.Tensor], told: Notes):
        self.layer = layer
        self.given = given
        self.told = told
        alpha = given.pop("alpha", None)
        if alpha is not None and alpha.numel() != 1:
            raise ValueError(f"its alpha is {alpha.numel()} numbers, not one")
        self.alpha = None if alpha is None else float(alpha)
        self.up_strength = 1.0
        scalar = given.pop("scalar", None)
        if scalar is not None and float(scalar.reshape(-1)[0]) != 1:
            raise ValueError("has a trained scalar, which LyCORIS folds in when it saves today")

    def low_rank(self) -> LowRank | None:
        if not {"down", "up", "mid"} & self.given.keys():
            return None
        down, up = self._take("down", "up")
        mid = self.given.pop("mid", None)
        rank = len(down)
        if mid is not None:  # a Tucker core: the kernel of a down factor of one pixel
            side = down.float().flatten(1).T
            core = mid.float()
            if core.shape[1] != rank or side.shape[0] != self.layer.shape[1]:
                raise ValueError(f"core {tuple(mid.shape)} does not fit {tuple(down.shape)}")
            down = torch.einsum("ijkl,cj->ickl", core, side)
        self.up_strength = self._strength(rank)
        num_out, *rest = self.layer.shape
        fits = up.flatten(1).shape == (num_out, len(down)) and _has_size(down, len(down), rest)
        if self.layer.kind == "norm" or not fits:
            raise ValueError(self._misfit(down, up))
        return LowRank(down.reshape(-1, *rest), up.flatten(1), self.up_strength)

    def hadamard(self) -> Hadamard | None:
        if not any(name.startswith("hada_") for name in self.given):
            return None
        names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
        # OneTrainer keeps those of a convolution as convolutions of its shape and of a pixel.
        a1, b1, a2, b2 = (side.flatten(1) for side in self._take(*names))
        core1, core2 = self.given.pop("hada_t1", None), self.given.pop("hada_t2", None)
        if (core1 is None) != (core2 is None):
            raise ValueError("has one of hada_t1 and hada_t2, not both")
        num_out, *rest = self.layer.shape
        outs = [len(a) if core1 is None else a.shape[1] for a in (a1, a2)]
        size = torch.Size(rest).numel()
        pixels = 1 if core1 is None else core1[0, 0].numel()
        inputs = [b.shape[1] * pixels for b in (b1, b2)]
        if self.layer.kind == "norm" or outs != [num_out] * 2 or inputs != [size] * 2:
            raise ValueError(self._misfit(a1, b1))
        return Hadamard(a1, b1, a2, b2, core1, core2, self._strength(len(b1)))

    def kronecker(self) -> Kronecker | Difference | None:
        if not any(name.startswith("lokr_") for name in self.given):
            return None
        left, left_rank = self._side("lokr_w1")
        right, right_rank = self._side("lokr_w2")
        rank = left_rank if right_rank is None else right_rank
        if rank is None:  # both whole: LyCORIS has no scale then, peft that of its settings
            self.alpha = None
        strength = self._strength(rank)
        num_out, *rest = self.layer.shape
        left, size = left.flatten(1), torch.Size(rest).numel()
        product = (len(left) * len(right), left.shape[1] * right[0].numel())
        if self.layer.kind == "norm" or product != (num_out, size):
            raise ValueError(self._misfit(left, right))
        if rest[0] % left.shape[1]:  # divided across a kernel: no product of two layers
            whole = torch.kron(left.float(), right.float().flatten(1)) * strength
            return Difference(whole.view(self.layer.shape))
        right = right.reshape(len(right), rest[0] // left.shape[1], *rest[1:])
        return Kronecker(left, right, strength)

    def _side(self, name: str) -> tuple[torch.Tensor, int | None]:
        """A side of a Kronecker product, multiplied out, and the rank of its factors."""
        whole = self.given.pop(name, None)
        if whole is not None:
            return whole, None
        a, b = (t.float() for t in self._take(f"{name}_a", f"{name}_b"))
        core = self.given.pop("lokr_t2", None) if name == "lokr_w2" else None
        return (a @ b if core is None else tucker(core.float(), a, b)), len(b)

    def difference(self) -> Difference | None:
        names = [name for name in ("diff", "w_norm") if name in self.given]
        if not names:
            return None
        value = self.given.pop(names[0])
        if value.numel() != torch.Size(self.layer.shape).numel():
            raise ValueError(self._misfit(value))
        if len(value) != self.layer.shape[0]:
            raise ValueError(self._misfit(value))
        return Difference(value.reshape(self.layer.shape))

    def magnitude(self) -> tuple[torch.Tensor | None, bool]:
        """A DoRA's lengths, and whether they are those of columns, as LyCORIS once had them."""
        scale, vector = self.given.pop("dora_scale", None), self.given.pop("magnitude", None)
        if scale is None and vector is None:
            return None, False
        if vector is not None or scale is None:
            given, of_columns = vector, False
        else:
            given, of_columns = scale, len(scale) != self.layer.shape[0]
        assert given is not None
        if given.numel() != self.layer.shape[1 if of_columns else 0]:
            raise ValueError(self._misfit(given))
        return given.flatten().float(), of_columns

    def bias(self) -> torch.Tensor | None:
        """The difference of the bias: kohya's as it is, peft's with the strength of its factors."""
        parts = [self.vector(name) for name in ("diff_b", "b_norm")]
        of_up = self.vector("up_bias")
        if of_up is not None:
            parts.append(of_up * self.up_strength)
        known = [part for part in parts if part is not None]
        return torch.stack(known).sum(0) if known else None

    def vector(self, name: str) -> torch.Tensor | None:
        value = self.given.pop(name, None)
        if value is not None and value.numel() != self.layer.shape[0]:
            raise ValueError(self._misfit(value))
        return None if value is None else value.flatten().float()

    def _take(self, *names: str) -> list[torch.Tensor]:
        missing = [name for name in names if name not in self.given]
        if missing:
            raise ValueError(f"its {missing[0]} is missing: the file is not whole")
        return [self.given.pop(name) for name in names]

    def _strength(self, rank: int | None) -> float:
        if rank == 0:
            raise ValueError("its rank is 0")
        if self.alpha == 0:
            raise ValueError(
                "its alpha is 0, which some tools read as the rank and others as no effect; write "
                "the rank there, or remove the layer"
            )
        if self.alpha is not None and not math.isfinite(self.alpha):
            raise ValueError(f"its alpha is {self.alpha}: it was too large for the file's dtype")
        return self.told.strength(self.layer.part, self.layer.name, rank, self.alpha)

    def _misfit(self, *tensors: torch.Tensor) -> str:
        shapes = " and ".join(str(tuple(tensor.shape)) for tensor in tensors)
        return f"it is for another model: {shapes} do not fit a weight {self.layer.shape}"


def _has_size(tensor: torch.Tensor, first: int, rest: list[int]) -> bool:
    """Whether a tensor is (first, *rest), perhaps flattened or with a kernel of one pixel more."""
    return len(tensor) == first and tensor[0].numel() == torch.Size(rest).numel()
