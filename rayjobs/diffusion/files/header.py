"""The header of a safetensors file: names, shapes and types of its tensors, and its metadata.

Owns the difference between a damaged file and one of another format. Knows nothing of models.
"""

import json
import struct
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

DISGUISES = (
    (b"PK\x03\x04", "is a pickle (a file of torch.save) under another name"),
    (b"\x80\x02", "is a pickle (a file of torch.save) under another name"),
    (b"\x80\x03", "is a pickle (a file of torch.save) under another name"),
    (b"\x80\x04", "is a pickle (a file of torch.save) under another name"),
    (
        b"version https://git-lfs",
        "is a Git LFS pointer, not the file; run `git lfs pull`",
    ),
    (b"<", "is a web page, not the file; download it again, with a login if it asks for one"),
    (b"GGUF", "is a GGUF file, whose quantized weights cannot be used; give a .safetensors file"),
)
"""What other files begin with. The first eight bytes of a safetensors file are a small number."""


@dataclass(frozen=True)
class Tensor:
    """Of one tensor: its type as the format spells it (F16, F8_E4M3, I64), shape and place."""

    dtype: str
    shape: tuple[int, ...]
    span: tuple[int, int]
    """First byte, and the one after its last, behind the header."""

    @property
    def size(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Header:
    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    start: int = 0
    """Bytes before the first tensor's."""

    @cached_property
    def names(self) -> frozenset[str]:
        return frozenset(self.tensors)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """None where there is no such tensor."""
        tensor = self.tensors.get(name)
        return None if tensor is None else tensor.shape

    def read(self, name: str) -> np.ndarray | None:
        """A tensor's numbers as float32; None where it is absent or is no 16 or 32-bit float."""
        tensor = self.tensors.get(name)
        if tensor is None or tensor.dtype not in ("F32", "F16", "BF16"):
            return None
        with self.path.open("rb") as file:
            file.seek(self.start + tensor.span[0])
            data = file.read(tensor.span[1] - tensor.span[0])
        if tensor.dtype == "BF16":
            wide = np.frombuffer(data, np.uint16).astype(np.uint32) << 16
            return wide.view(np.float32).reshape(tensor.shape)
        kind = np.float16 if tensor.dtype == "F16" else np.float32
        return np.frombuffer(data, kind).astype(np.float32).reshape(tensor.shape)


def read_header(path: Path) -> Header:
    """Raises ValueError for a file that is damaged, cut off, or none of safetensors."""
    try:
        with safe_open(path, "np"):  # compares the header with the file's length
            pass
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            values: dict[str, Any] = json.loads(file.read(length))
    except (SafetensorError, OSError) as error:
        raise ValueError(_reason(path) or f"{path} cannot be read: {first_line(error)}") from None
    metadata = values.pop("__metadata__", None) or {}
    tensors = {
        name: Tensor(each["dtype"], tuple(each["shape"]), tuple(each["data_offsets"]))
        for name, each in values.items()
    }
    return Header(path, tensors, metadata, 8 + length)


def is_safetensors(path: Path) -> bool:
    """By content, whatever the file is called."""
    try:
        read_header(path)
    except ValueError:
        return False
    return True


def _reason(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            first = file.read(32)
    except OSError:
        return None
    if not first:
        return f"{path} is empty"
    kinds = (what for begin, what in DISGUISES if first.lstrip().startswith(begin))
    what = next(kinds, None)
    return None if what is None else f"{path} {what}"


def first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
