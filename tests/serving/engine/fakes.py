"""A cache of models that reads no weights, and adapters that only count."""

import asyncio
from collections import deque
from collections.abc import Awaitable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rayjobs.models.options import WordConfig
from serve.config import EngineConfig
from serve.engine import models
from serve.engine.forecast import Forecast
from serve.engine.models import LoadedModel, ModelCache
from serve.registry import Weights

A, B, C = Weights("a"), Weights("b"), Weights("c")
GB = 2**30
WORD = WordConfig(uri="file", word="<sks>")


@dataclass
class FakeLoras:
    """Counts what is admitted and forgotten."""

    num_bytes: int = 0
    admitted: list[str] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)

    def read(self, path: str) -> Any:
        return SimpleNamespace(num_bytes=lambda dtype: GB, path=path)

    def place(self, adapter: Any) -> Any:
        return SimpleNamespace(path=adapter.path, sha256=adapter.path, num_bytes=GB)

    def admit(self, adapter: Any) -> str:
        self.admitted.append(adapter.path)
        return str(adapter.sha256)

    def forget(self, sha256: str) -> None:
        self.forgotten.append(sha256)


class Cache(ModelCache):
    """Reads no files: a load makes a fake model, or raises the next of `errors[uri]`."""

    def __init__(self, gigabytes: float, **config: Any):
        engine = EngineConfig(model_memory_gb=gigabytes, **config)
        self.loads: list[tuple[Weights, float]] = []
        super().__init__(engine, Forecast(16, 1.0), lambda *load: self.loads.append(load))
        self.errors: dict[str, deque[BaseException]] = {}

    def _read(self, weights: Weights, base: LoadedModel | None) -> Any:
        if self.errors.get(weights.uri):
            raise self.errors[weights.uri].popleft()
        return SimpleNamespace(uri=weights.uri, base=base)

    def _with_engine(self, weights: Weights, model: Any, num_bytes: int) -> LoadedModel:
        model.dtype, model.compiled = torch.float32, None
        none = SimpleNamespace(num_bytes=0)
        parts = {"loras": FakeLoras(), "controls": none, "ip_adapters": none}
        engine: Any = SimpleNamespace(**parts, model=model, rows={})
        batcher: Any = None
        return LoadedModel(weights, engine, batcher, num_bytes)


@pytest.fixture(autouse=True)
def one_gigabyte_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_size_of", lambda uri: GB)
    monkeypatch.setattr(models, "_fetch", lambda weights: weights)
    monkeypatch.setattr(models, "_num_bytes", lambda model, shares: GB // 4 if shares else GB)


def run(work: Awaitable[Any]) -> Any:
    async def main() -> Any:
        return await work

    return asyncio.run(main())


async def use(cache: ModelCache, weights: Weights) -> LoadedModel:
    """Acquire and release, as a request does."""
    loaded = await cache.acquire(weights)
    cache.release(loaded)
    return loaded
