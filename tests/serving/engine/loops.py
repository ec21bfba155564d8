"""An engine loop with the starter model, what it is asked, and what it answers."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from rayjobs.diffusion.model import Model
from serve.config import ServeConfig
from serve.engine.loop import EngineLoop
from serve.protocol import Event, ImagesRequest
from serve.registry import Registry

STARTER = {"models": [{"name": "starter", "uri": "starter"}]}


@pytest.fixture(autouse=True)
def loaded_once(starter: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every loop has the same model, recorded by the first; test_registry.py loads them."""
    monkeypatch.setattr("serve.engine.models.load_weights", lambda *_, **__: starter)


@asynccontextmanager
async def running(checker: Any = None, **engine: Any) -> AsyncIterator[EngineLoop]:
    # Each step computes all places of a replica, the empty ones too.
    config = ServeConfig.model_validate(STARTER | {"engine": {"max_rows": 4} | engine})
    loop = EngineLoop(config.engine, Registry(config), safety=checker)
    try:
        await loop.warm_up("starter")
        yield loop
    finally:
        await loop.close()
        assert loop.failure is None, loop.failure


def make_request(**keys: Any) -> ImagesRequest:
    values = {"id": "1", "caller": "me", "model": "starter", "prompt": "a red star", "steps": 6}
    return ImagesRequest(**{**values, **keys})


async def all_of(loop: EngineLoop, what: ImagesRequest) -> list[Event]:
    return [event async for event in loop.generate(what)]


def of_kind(events: list[Event], kind: type) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]


async def eventually(holds: Callable[[], bool], seconds: float = 10) -> None:
    end_s = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end_s, "it did not come true"
        await asyncio.sleep(0.01)


def run(work: Awaitable[Any]) -> Any:
    async def main() -> Any:
        return await work

    return asyncio.run(main())
