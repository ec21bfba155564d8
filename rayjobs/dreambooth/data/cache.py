"""A cache of encodings: the autoencoder's moments of views, the text encoders' states of captions.

Owns their names, and their copies on storage and in memory. A name covers all that an encoding
depends on, so a changed image or model never gets an old one.
"""

import hashlib
from pathlib import Path

import torch
from cachetools import LRUCache
from safetensors.torch import load, save

from rayjobs import storage

Tensors = dict[str, torch.Tensor]
MAX_BYTES_IN_MEMORY = 2 * 2**30


class Cache:
    """Small tensors by name, below `uri`; the most recently used are kept in memory."""

    def __init__(self, uri: str, model_sha256: str):
        self.uri = uri
        self._model = model_sha256
        self._in_memory: LRUCache[str, Tensors] = LRUCache(MAX_BYTES_IN_MEMORY, _num_bytes)

    def missing(self, names: list[str]) -> list[str]:
        """Those of `names` that are not stored yet."""
        stored = set(storage.list_files(self.uri))
        return [name for name in names if self._file(name) not in stored]

    def put(self, name: str, tensors: Tensors) -> None:
        on_cpu = {key: tensor.float().cpu().contiguous() for key, tensor in tensors.items()}
        storage.write_bytes(self._uri(name), save(on_cpu), durable=False)

    def get(self, name: str) -> Tensors:
        """float32 tensors on the CPU."""
        tensors: Tensors | None = self._in_memory.get(name)
        if tensors is None:
            tensors = self._in_memory[name] = load(storage.read_bytes(self._uri(name)))
        return tensors

    def _file(self, name: str) -> str:
        hashed = hashlib.sha256(f"{self._model}\0{name}".encode()).hexdigest()
        return str(Path(hashed[:2]) / f"{hashed[2:34]}.safetensors")

    def _uri(self, name: str) -> str:
        return storage.join(self.uri, self._file(name))


def _num_bytes(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
