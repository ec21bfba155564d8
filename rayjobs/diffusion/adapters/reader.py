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
from rayjobs.diffusion.adapters.change import Change, read_change
from rayjobs.diffusion.adapters.names import (
    Layer,
    Layers,
    blocks,
    family_of,
    size_tells_family,
)
from rayjobs.diffusion.facts import Usual, adapter_usual, file_name
from rayjobs.diffusion.files.header import first_line
from rayjobs.diffusion.files.single import DEPTHS

Tensors = Mapping[str, torch.Tensor]
FAMILY_NAMES = {"sdxl": "SDXL", "sd": "Stable Diffusion 1.x or 2.x"}


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
    prediction: str | None = None
    """What the model predicts that it was trained for, where the file says so."""
    warnings: tuple[str, ...] = ()

    def num_bytes(self, dtype: torch.dtype) -> int:
        """Of its tensors beside a model of this dtype."""
        deltas = (delta for change in self.changes.values() for delta in change.deltas)
        return dtype.itemsize * sum(t.numel() for delta in deltas for t in delta.tensors)

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
    of_model = {key: it for key, it in tensors.items() if not keys.BUNDLED.fullmatch(key)}
    try:
        by_layer = _by_layer(of_model, layers, file.parent.name)
        changes = _changes(by_layer, told)
    except ValueError:
        _check_family(told.family, layers.family)
        raise
    if not any(size_tells_family(layer) for layer in changes):
        _check_family(told.family, layers.family)
    is_bare = not told.tells_strength and _is_peft_without_alpha(by_layer, tensors)
    said = {
        "has peft's names but neither alpha nor its adapter_config.json beside it: alpha is taken "
        "to be the rank": is_bare,
        f"says in its metadata that it is for {FAMILY_NAMES.get(str(told.family), told.family)}, "
        "and its tensors are not": told.family not in (None, layers.family),
        **{
            warning: True for warning in (_of_words(tensors), _of_depth(changes, layers)) if warning
        },
    }
    warnings = tuple(f"LoRA {file.name} {what}" for what, is_so in said.items() if is_so)
    usual = adapter_usual(f"{file_name(path)} {told.title}")
    is_dora = any(change.magnitude is not None for change in changes.values())
    sha256 = notes.file_sha256(file)
    return Adapter(path, file, sha256, changes, is_dora, usual, told.prediction, warnings)


def _changes(
    by_layer: Mapping[Layer, Mapping[str, torch.Tensor]], told: notes.Notes
) -> dict[Layer, Change]:
    changes = {}
    for layer, given in by_layer.items():
        try:
            changes[layer] = read_change(layer, dict(given), told)
        except (ValueError, RuntimeError, IndexError) as error:
            raise ValueError(f"{layer}: {first_line(error)}") from None
    return changes


def _check_family(family: str | None, of_model: str) -> None:
    """Raise ValueError where the metadata names another family than the model's."""
    if family not in (None, of_model):
        raise ValueError(_other_family(str(family), of_model))


def _of_words(tensors: Tensors) -> str | None:
    words = {found["word"] for key in tensors if (found := keys.BUNDLED.fullmatch(key))}
    if not words:
        return None
    return (
        f"carries embeddings of {', '.join(sorted(words))}, which are not used: save them as "
        "embedding files and give them as words"
    )


def _of_depth(changes: Mapping[Layer, Change], layers: Layers) -> str | None:
    """A warning for the adapter of a distilled SDXL, all of whose layers SDXL has as well."""
    mine, of_model = blocks(changes), blocks(layers.of_unet)
    deepest = max(map(len, of_model.values()), default=0)
    deep = [found for name, found in mine.items() if len(of_model[name]) == deepest]
    for depth, version in DEPTHS.items():
        if depth < deepest and deep and all(found == set(range(depth)) for found in deep):
            return (
                f"changes the first {depth} of {deepest} transformer blocks, which are all that "
                f"{version} has: it may be made for that model"
            )
    return None


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
    if not tensor.isfinite().all() and not key.endswith(".alpha"):
        raise ValueError(f"{key!r} holds NaN or infinity: the file's training diverged")
    return tensor


def _by_layer(
    tensors: Tensors, layers: Layers, folder: str
) -> dict[Layer, dict[str, torch.Tensor]]:
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
        layer = _layer(name, key, layers, folder)
        if (layer, kind) in sources:
            raise ValueError(f"{sources[layer, kind]!r} and {key!r} are both for {layer}")
        sources[layer, kind] = key
        by_layer.setdefault(layer, {})[kind] = tensors[key]
    return by_layer


def _layer(name: str, key: str, layers: Layers, folder: str) -> Layer:
    family = family_of(name)
    if family not in (None, layers.family):
        raise ValueError(f"{key!r} is a name of {_other_family(str(family), layers.family)}")
    layer = layers.find(name, folder)
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
