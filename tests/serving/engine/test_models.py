"""Models in memory: loaded once, kept while in use, evicted by bytes. No weights are read."""

import asyncio
import threading
import weakref
from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rayjobs import storage
from rayjobs.config import BadInput
from rayjobs.models.options import LoadOptions
from serve.config import EngineConfig
from serve.engine import memory, models
from serve.engine.models import LoadedModel, ModelMemoryFull
from serve.engine.pacer import Pacer, StepTiming
from serve.registry import Weights
from tests.serving.engine.fakes import (
    GB,
    WORD,
    A,
    B,
    C,
    Cache,
    one_gigabyte_each,
    run,
    use,
)

__all__ = ["one_gigabyte_each"]


def test_a_model_is_loaded_once_for_all_who_wait() -> None:
    async def work() -> None:
        cache = Cache(4)
        first, second = await asyncio.gather(cache.acquire(A), cache.acquire(A))
        assert first is second
        assert first.users == 2
        assert [weights for weights, _ in cache.loads] == [A]

    run(work())


def test_a_caller_who_leaves_does_not_end_the_load() -> None:
    async def work() -> None:
        cache = Cache(4)
        task = asyncio.create_task(cache.acquire(A))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        loaded = await cache.acquire(A)
        assert loaded.users == 1
        assert len(cache.loads) == 1

    run(work())


def test_a_model_whose_storage_never_answers_delays_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answered = threading.Event()

    def fetch(weights: Weights) -> Weights:
        if weights == A:
            answered.wait(30)
        return weights

    monkeypatch.setattr(models, "_fetch", fetch)

    async def work() -> None:
        cache = Cache(4)
        slow = asyncio.create_task(cache.acquire(A))
        await asyncio.sleep(0)
        assert (await cache.acquire(B)).weights == B
        assert not slow.done()
        answered.set()
        await slow

    run(work())


def test_the_least_recently_used_is_evicted() -> None:
    async def work() -> None:
        cache = Cache(2.5)
        for weights in (A, B, A, C):
            await use(cache, weights)
        assert list(cache.loaded) == [A, C]

    run(work())


def test_a_model_in_use_is_not_evicted() -> None:
    async def work() -> None:
        cache = Cache(2.5)
        a = await cache.acquire(A)
        await use(cache, B)
        await use(cache, C)  # B goes, though A is older
        assert list(cache.loaded) == [A, C]
        c = await cache.acquire(C)
        with pytest.raises(ModelMemoryFull, match="try again later"):
            await cache.acquire(B)
        cache.release(a)
        await use(cache, B)
        assert list(cache.loaded) == [C, B]
        assert c.users == 1

    run(work())


def test_a_first_model_is_tried_whatever_its_size() -> None:
    async def work() -> None:
        cache = Cache(0.5)
        await use(cache, A)
        assert list(cache.loaded) == [A]
        await use(cache, B)
        assert list(cache.loaded) == [B]

    run(work())


def test_adapters_count_as_memory() -> None:
    async def work() -> None:
        cache = Cache(3)
        a = await use(cache, A)
        await use(cache, B)
        a.engine.loras.num_bytes = GB + 1
        await use(cache, C)
        assert list(cache.loaded) == [B, C]

    run(work())


def test_embeddings_share_a_loaded_base_and_keep_it() -> None:
    async def work() -> None:
        cache = Cache(1.5)
        base = await use(cache, A)
        tuned = await cache.acquire(Weights("a", words=(WORD,), version="1"))
        assert tuned.base is base
        assert tuned.num_bytes == GB // 4
        assert base.users == 1
        with pytest.raises(ModelMemoryFull):
            await cache.acquire(B)
        cache.release(tuned)
        await use(cache, B)
        assert list(cache.loaded) == [B]
        assert list(cache.leaving) == [tuned]
        assert base.users == 0

    run(work())


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (ValueError("no unet\nat all"), BadInput, "cannot be loaded: no unet"),
        (torch.OutOfMemoryError("CUDA"), ModelMemoryFull, "does not fit in memory"),
        (storage.Unavailable("it is away"), storage.Unavailable, "away"),
    ],
)
def test_a_load_that_fails_can_be_tried_again(
    error: Exception, kind: type[Exception], message: str
) -> None:
    async def work() -> None:
        cache = Cache(4)
        cache.errors["a"] = deque([error])
        with pytest.raises(kind, match=message):
            await cache.acquire(A)
        assert (await cache.acquire(A)).users == 1

    run(work())


class Event:
    """Of a device that takes a second for a step."""

    def __init__(self, enable_timing: bool):
        assert enable_timing

    def record(self) -> None: ...
    def synchronize(self) -> None: ...

    def elapsed_time(self, end: "Event") -> float:
        return 1000.0


def test_an_evicted_model_is_gone_when_its_memory_is_given_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also one that made the last step: once it is over, nothing remembers it."""
    evicted: list[weakref.ref[LoadedModel]] = []
    alive: list[bool] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(
        torch.cuda, "empty_cache", lambda: alive.extend(ref() is not None for ref in evicted)
    )

    async def work() -> None:
        cache, pacer = Cache(2), Pacer()
        loaded = await use(cache, A)
        evicted.append(weakref.ref(loaded))
        pacer.begin()
        assert not list(pacer.end(StepTiming(loaded, None, 0.0, 0.0, 1)))
        del loaded
        assert [seconds for _, seconds in pacer.finish()] == [1.0]
        await use(cache, B)
        await use(cache, C)
        assert list(cache.loaded) == [B, C]
        assert alive == [False]

    run(work())


@pytest.mark.parametrize(
    ("num_gpus", "models_gb", "step_gb"), [(0.5, 14, 5), (0.25, 7, 0), (1, 28, 12), (2, 28, 12)]
)
def test_a_part_of_a_card_is_a_part_of_its_memory(
    monkeypatch: pytest.MonkeyPatch, num_gpus: float, models_gb: float, step_gb: float
) -> None:
    """Of a card of 40 GB, of which 10 are free, and 2 of this process's that it does not use."""
    shares = [1.0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares.append)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda: shares[-1])
    card = SimpleNamespace(total_memory=40 * GB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10 * GB, 40 * GB))
    held_gb = min(15, 40 * num_gpus)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: int(held_gb * GB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: int((held_gb + 2) * GB))
    memory.keep_to_share(num_gpus)
    assert memory.for_models(EngineConfig()) == pytest.approx(models_gb * GB)
    assert memory.for_a_step() == step_gb * GB
    assert memory.for_models(EngineConfig(model_memory_gb=3)) == 3 * GB


def test_a_failed_load_releases_its_base() -> None:
    async def work() -> None:
        cache = Cache(4)
        base = await use(cache, A)
        cache.errors["a"] = deque([ValueError("not an embedding")])
        with pytest.raises(BadInput):
            await cache.acquire(Weights("a", words=(WORD,)))
        assert base.users == 0

    run(work())


def test_a_model_is_warm_before_it_takes_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled is compiled in the loader's thread; where that fails there is no model."""
    seen: list[tuple[str, bool, str | None]] = []

    def warm(engine: Any, cache_uri: str | None) -> None:
        is_main = threading.current_thread() is threading.main_thread()
        seen.append((engine.model.uri, weights in cache.loaded or is_main, cache_uri))
        if len(seen) == 1:
            raise torch.OutOfMemoryError

    monkeypatch.setattr(models, "warm", warm)
    weights = Weights("a", how=LoadOptions(compile_cache="s3://here"))

    async def scenario() -> None:
        with pytest.raises(ModelMemoryFull):
            await cache.acquire(weights)
        assert not cache.loaded
        assert (await cache.acquire(weights)).weights == weights

    cache = Cache(4)
    asyncio.run(scenario())
    assert seen == [("a", False, "s3://here")] * 2
