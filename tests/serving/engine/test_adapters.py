"""Adapters beside models in memory: counted, evicted, replaced. No weights are read."""

from types import SimpleNamespace
from typing import Any

import pytest

from rayjobs import storage
from rayjobs.config import BadInput
from serve.engine import models
from serve.engine.models import ModelMemoryFull
from tests.serving.engine.fakes import (
    GB,
    A,
    B,
    Cache,
    one_gigabyte_each,
    run,
    use,
)

__all__ = ["one_gigabyte_each"]


def adapter(name: str, sha256: str | None = None, num_bytes: int = 0) -> Any:
    return SimpleNamespace(path=name, sha256=sha256 or name, num_bytes=num_bytes)


def test_too_many_adapters_evict_the_oldest_idle_one() -> None:
    async def work() -> None:
        cache = Cache(4, max_loras=2)
        loaded = await cache.acquire(A)
        loras: Any = loaded.engine.loras
        cache.admit(loaded, adapter("x"), set())
        cache.admit(loaded, adapter("y"), set())
        cache.admit(loaded, adapter("x"), set())  # there already
        assert loras.admitted == ["x", "y"]
        cache.admit(loaded, adapter("z"), {"x"})
        assert loras.forgotten == ["y"]
        cache.admit(loaded, adapter("w"), {"x", "z"})  # all in use: one more than usual
        assert sorted(loaded.adapters) == ["w", "x", "z"]

    run(work())


def test_weights_that_two_paths_share_are_not_forgotten() -> None:
    async def work() -> None:
        cache = Cache(4, max_loras=2)
        loaded = await cache.acquire(A)
        loras: Any = loaded.engine.loras
        cache.admit(loaded, adapter("x", "same"), set())
        cache.admit(loaded, adapter("y", "same"), set())
        cache.admit(loaded, adapter("z"), set())
        assert loras.forgotten == []
        cache.admit(loaded, adapter("w"), set())
        assert loras.forgotten == ["same"]

    run(work())


def test_adapters_stay_within_their_memory() -> None:
    async def work() -> None:
        cache = Cache(4, lora_memory_gb=1)
        loaded = await cache.acquire(A)
        loras: Any = loaded.engine.loras
        for name in ("x", "y", "z"):
            cache.admit(loaded, adapter(name, num_bytes=GB // 3), set())
        loaded.adapters["x"].used_s += 1  # a request came for it again
        cache.admit(loaded, adapter("w", num_bytes=GB // 2), {"z"})
        assert loras.forgotten == ["y", "x"]
        with pytest.raises(ModelMemoryFull, match="LoRAs of requests in progress fill"):
            cache.admit(loaded, adapter("v", num_bytes=GB // 2), {"w", "z"})
        assert sorted(loaded.adapters) == ["w", "z"]

    run(work())


def test_a_replaced_adapter_leaves_with_its_last_row() -> None:
    async def work() -> None:
        cache = Cache(4)
        loaded = await cache.acquire(A)
        engine: Any = loaded.engine
        cache.admit(loaded, adapter("x", "old"), set())
        engine.rows = {0: SimpleNamespace(loras=(("old", 1.0),))}
        cache.admit(loaded, adapter("x", "new"), {"x"})
        assert engine.loras.forgotten == []
        engine.rows = {}
        cache.admit(loaded, adapter("y"), set())
        assert engine.loras.forgotten == ["old"]

    run(work())


def test_an_adapter_makes_room_or_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "lora_file", lambda path: path)
    monkeypatch.setattr(storage, "to_local", lambda uri: uri)

    async def work() -> None:
        cache = Cache(2.5, lora_memory_gb=1)
        loaded = await cache.acquire(A)
        await use(cache, B)
        placed = await cache.read_adapter(loaded, "x", "1")
        assert list(cache.loaded) == [A]
        cache.admit(loaded, placed, set())
        assert await cache.read_adapter(loaded, "x", "1") == "x"
        small = Cache(2.5)  # of which adapters may take a quarter
        loaded = await small.acquire(A)
        with pytest.raises(BadInput, match=r"takes 1 GiB, more than engine.lora_memory_gb, 0.625"):
            await small.read_adapter(loaded, "x", "1")

    run(work())
