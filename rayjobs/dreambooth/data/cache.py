"""Encodings made once: the autoencoder's moments of each view, the text encoders' of each caption.

Owns their names, and their copies on storage and on this machine. A name says all that an encoding
depends on, so a changed picture or model never meets an old one.
"""

import hashlib
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors.torch import load, save

from rayjobs import storage

Tensors = dict[str, torch.Tensor]
MOST_HELD_BYTES = 2 * 2**30


class Cache:
    """Small tensors by name, below `uri`; the latest used are held in memory."""

    def __init__(self, uri: str, model_sha256: str):
        self.uri = uri
        self._model = model_sha256
        self._held: OrderedDict[str, Tensors] = OrderedDict()
        self._held_bytes = 0

    def missing(self, names: list[str]) -> list[str]:
        """Those of `names` that nobody has stored."""
        there = set(storage.list_files(self.uri))
        return [name for name in names if self._file(name) not in there]

    def put(self, name: str, tensors: Tensors) -> None:
        plain = {key: tensor.float().cpu().contiguous() for key, tensor in tensors.items()}
        storage.write_bytes(self._uri(name), save(plain), durable=False)

    def get(self, name: str) -> Tensors:
        """float32 tensors on the CPU."""
        if name in self._held:
            self._held.move_to_end(name)
            return self._held[name]
        found = load(storage.read_bytes(self._uri(name)))
        self._held[name] = found
        self._held_bytes += _num_bytes(found)
        while self._held_bytes > MOST_HELD_BYTES and len(self._held) > 1:
            self._held_bytes -= _num_bytes(self._held.popitem(last=False)[1])
        return found

    def _file(self, name: str) -> str:
        hashed = hashlib.sha256(f"{self._model}\0{name}".encode()).hexdigest()
        return str(Path(hashed[:2]) / f"{hashed[2:34]}.safetensors")

    def _uri(self, name: str) -> str:
        return storage.join(self.uri, self._file(name))


def _num_bytes(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
