"""The API on a real port with engines that a test invents: no Ray, no model."""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import uvicorn

from serve.config import ServeConfig
from serve.ingress.api import create_app
from serve.ingress.images_api import ImagesApi
from serve.protocol import Event, Finished, ImagesRequest, Pixels, Waiting
from tests.servers import free_ports

CONFIG: dict[str, Any] = {"models": [{"name": "starter", "uri": "starter"}]}


class QuickEngines:
    """Every image is grey and there after `step_s`."""

    def __init__(self, step_s: float = 0.0) -> None:
        self.step_s = step_s
        self.asked: list[ImagesRequest] = []
        self.looks = 0
        """How often the page, or somebody else, has asked for the models."""

    async def events(self, request: ImagesRequest, streamed: bool) -> AsyncIterator[Event]:
        self.asked.append(request)
        yield Waiting(0, self.step_s)
        for number, seed in enumerate(request.seeds):
            await asyncio.sleep(self.step_s)
            side = request.width or 16
            yield Finished(number, seed, Pixels(side, side, bytes([128]) * (3 * side * side)))

    async def states(self) -> dict[str, dict[str, Any]]:
        self.looks += 1
        return {}


@contextlib.contextmanager
def serving(engines: Any = None, **keys: Any) -> Iterator[str]:
    """The URL of an API with these engines."""
    config = ServeConfig.model_validate(CONFIG | keys)
    with served(config, ImagesApi(config, engines or QuickEngines())) as url:
        yield url


@contextlib.contextmanager
def served(config: ServeConfig, api: ImagesApi) -> Iterator[str]:
    """The URL of this API."""
    app = create_app(config, api)
    [port] = free_ports(1)
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join(10)
