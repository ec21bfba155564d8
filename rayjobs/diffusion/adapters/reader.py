"""From an adapter file of any tool to what each layer of a model gains.

Owns the check that every tensor of a file is used, and refuses a file that has one which is not:
an adapter applied in part is a wrong picture. Knows nothing of rows. Legend as in `deltas`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open

from rayjobs.diffusion.adapters import keys, notes
from rayjobs.diffusion.adapters.deltas import (
    Delta,
    Difference,
    Hadamard,
    Kronecker,
    LowRank,
    tucker,
)
from rayjobs.diffusion.adapters.names import Layer, Layers, family_of
from rayjobs.diffusion.facts import Usual, adapter_usual, file_name
from rayjobs.diffusion.files.header import first_line

Tensors = Mapping[str, torch.Tensor]
FAMILY_NAMES = {"sdxl": "SDXL", "sd": "Stable Diffusion 1.x or 2.x"}


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


@dataclass(frozen=True)
class Adapter:
    """An adapter file that has been read; it fits the model whose layers it was read for."""

    path: str
    file: Path
    sha256: str
    changes: Mapping[Layer, Change]
    is_dora: bool = False
    usual: Usual | None = None
    """What to ask for with an adapter that makes the model a distilled one."""
    warnings: tuple[str, ...] = ()

    def without_tensors(self) -> "Adapter":
        return replace(self, changes={})


def read(path: str, file: Path, layers: Layers) -> Adapter:
    """Read the adapter in `file` for a model with these layers.

    Raises ValueError, naming the key and the way out: the file is damaged, is no adapter or one
    that cannot be used, is for another model, or lacks a tensor.
    """
    try:
        return _read(path, file, layers)
    except ValueError as error:
        raise ValueError(f"LoRA {file.name}: {error}") from None


def _read(path: str, file: Path, layers: Layers) -> Adapter:
    header, tensors = _load(file)
    told = notes.read(file, header)
    if told.family not in (None, layers.family):
        raise ValueError(_other_family(str(told.family), layers.family))
    words = {m["word"] for key in tensors if (m := keys.BUNDLED.fullmatch(key))}
    by_layer = _by_layer(
        {k: v for k, v in tensors.items() if not keys.BUNDLED.fullmatch(k)}, layers
    )
    changes = {}
    for layer, given in by_layer.items():
        try:
            changes[layer] = _change(layer, dict(given), told)
        except ValueError as error:
            raise ValueError(f"{layer}: {error}") from None
    warnings = []
    if not told.tells_strength and _is_peft_without_alpha(by_layer, tensors):
        warnings.append(
            f"LoRA {file.name} has peft's names but neither alpha nor its adapter_config.json "
            "beside it: alpha is taken to be the rank"
        )
    if words:
        warnings.append(
            f"LoRA {file.name} carries embeddings of {', '.join(sorted(words))}, which are not "
            "used: save them as embedding files and give them as words"
        )
    usual = adapter_usual(f"{file_name(path)} {told.title}")
    is_dora = any(change.magnitude is not None for change in changes.values())
    return Adapter(path, file, notes.file_sha256(file), changes, is_dora, usual, tuple(warnings))


def _is_peft_without_alpha(
    by_layer: Mapping[Layer, Mapping[str, torch.Tensor]], tensors: Tensors
) -> bool:
    has_alpha = any("alpha" in fields for fields in by_layer.values())
    return not has_alpha and any(key.startswith("base_model.model.") for key in tensors)


def _load(file: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    try:
        with safe_open(file, "pt") as opened:
            header = opened.metadata() or {}
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except Exception as error:
        raise ValueError(f"cannot be read: {first_line(error)}") from None
    if not tensors:
        raise ValueError("is no adapter: it holds no tensors")
    return header, {key: _checked(key, tensor) for key, tensor in tensors.items()}


def _checked(key: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in a dtype that can be computed with."""
    if not tensor.is_floating_point():
        if tensor.numel() == 1:  # an alpha, or LyCORIS' flag
            return tensor.float()
        raise ValueError(f"{key!r} is quantized ({tensor.dtype}); save it in fp16 or bf16")
    if tensor.dtype.itemsize == 1:
        tensor = tensor.float()
    if not tensor.isfinite().all():
        raise ValueError(f"{key!r} holds NaN or infinity: the file's training diverged")
    return tensor


def _by_layer(tensors: Tensors, layers: Layers) -> dict[Layer, dict[str, torch.Tensor]]:
    """The tensors of each layer by field. Raises ValueError unless each has its place."""
    parsed = {key: keys.parse(key) for key in tensors}
    unknown = [key for key, found in parsed.items() if found is None]
    if unknown:
        told = [key for key in unknown if any(keys.re.search(p, key) for p, *_ in keys.FOREIGN)]
        raise ValueError(keys.foreign((told or unknown)[0]))
    by_layer: dict[Layer, dict[str, torch.Tensor]] = {}
    sources: dict[tuple[Layer, str], str] = {}
    for key, found in parsed.items():
        assert found is not None
        name, kind = found
        layer = _layer(name, key, layers)
        if (layer, kind) in sources:
            raise ValueError(f"{sources[layer, kind]!r} and {key!r} are both for {layer}")
        sources[layer, kind] = key
        by_layer.setdefault(layer, {})[kind] = tensors[key]
    return by_layer


def _layer(name: str, key: str, layers: Layers) -> Layer:
    family = family_of(name)
    if family not in (None, layers.family):
        raise ValueError(f"{key!r} is a name of {_other_family(str(family), layers.family)}")
    layer = layers.find(name)
    if layer is None:
        for pattern, *_ in keys.FOREIGN:
            if keys.re.search(pattern, key):
                raise ValueError(keys.foreign(key))
        raise ValueError(f"it is for another model: this one has no layer for {key!r}")
    return layer


def _other_family(family: str, of_model: str) -> str:
    return (
        f"an adapter for {FAMILY_NAMES.get(family, family)}; this model is "
        f"{FAMILY_NAMES.get(of_model, of_model)}"
    )


def _change(layer: Layer, given: dict[str, torch.Tensor], told: notes.Notes) -> Change:
    """What the tensors of one layer mean; takes each from `given`, and leaves none."""
    reader = _LayerReader(layer, given, told)
    deltas = [
        delta
        for delta in (reader.low_rank(), reader.hadamard(), reader.kronecker(), reader.difference())
        if delta is not None
    ]
    magnitude, of_columns = reader.magnitude()
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

    def __init__(self, layer: Layer, given: dict[str, torch.Tensor], told: notes.Notes):
        self.layer = layer
        self.given = given
        self.told = told
        alpha = given.pop("alpha", None)
        self.alpha = None if alpha is None else float(alpha.float().reshape(-1)[0])
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
        a1, b1, a2, b2 = self._take("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
        core1, core2 = self.given.pop("hada_t1", None), self.given.pop("hada_t2", None)
        if (core1 is None) != (core2 is None):
            raise ValueError("has one of hada_t1 and hada_t2, not both")
        num_out, *rest = self.layer.shape
        outs = [len(a) if core1 is None else a.shape[1] for a in (a1, a2)]
        size = torch.Size(rest).numel()
        pixels = 1 if core1 is None else core1[0, 0].numel()
        if self.layer.kind == "norm" or outs != [num_out] * 2 or b1.shape[1] * pixels != size:
            raise ValueError(self._misfit(a1, b1))
        return Hadamard(a1, b1, a2, b2, core1, core2, self._strength(len(b1)))

    def kronecker(self) -> Kronecker | Difference | None:
        if not any(name.startswith("lokr_") for name in self.given):
            return None
        left, left_rank = self._side("lokr_w1")
        right, right_rank = self._side("lokr_w2")
        rank = right_rank or left_rank
        # Both whole: LyCORIS has no scale then, peft that of its settings.
        strength = self.told.strength(
            self.layer.part, self.layer.name, rank, self.alpha if rank else None
        )
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

    def _strength(self, rank: int) -> float:
        return self.told.strength(self.layer.part, self.layer.name, rank, self.alpha)

    def _misfit(self, *tensors: torch.Tensor) -> str:
        shapes = " and ".join(str(tuple(tensor.shape)) for tensor in tensors)
        return f"it is for another model: {shapes} do not fit a weight {self.layer.shape}"


def _has_size(tensor: torch.Tensor, first: int, rest: list[int]) -> bool:
    """Whether a tensor is (first, *rest), perhaps flattened or with a kernel of one pixel more."""
    return len(tensor) == first and tensor[0].numel() == torch.Size(rest).numel()
