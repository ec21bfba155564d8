"""Keys and their limits."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from fastapi import FastAPI

from serve.config import AuthConfig, KeyConfig, ServeConfig
from serve.errors import ApiError
from serve.ingress.api import create_app
from serve.ingress.auth import ApiKeys
from serve.ingress.images_api import ImagesApi
from serve.limits.keeper import Limits
from serve.protocol import Event, ImagesRequest

KEY = KeyConfig(name="team", key="k" * 20, max_concurrent=1, images_per_minute=3)
CONFIG = {"models": [{"name": "starter", "uri": "starter"}], "auth": {"keys": [KEY.model_dump()]}}


def test_a_key_s_images_of_a_minute() -> None:
    async def main() -> None:
        keys = ApiKeys(AuthConfig(keys=(KEY,)), Limits())
        await keys.take_images(KEY, 2)
        with pytest.raises(ApiError) as refused:
            await keys.take_images(KEY, 2)
        assert refused.value.status == 429
        assert 20 <= float(refused.value.headers["retry-after"]) <= 30
        await keys.take_images(KEY, 1)
        await keys.take_images("127.0.0.1", 1000)

    asyncio.run(main())


def test_a_key_s_requests_at_once() -> None:
    async def main() -> None:
        keys = ApiKeys(AuthConfig(keys=(KEY,)), Limits())
        leave = await keys.enter(KEY)
        with pytest.raises(ApiError, match="1 requests of this key"):
            await keys.enter(KEY)
        for _ in range(2):
            await keys.enter("127.0.0.1")
        leave()
        await keys.enter(KEY)

    asyncio.run(main())


class Nobody:
    """No engine is ever asked."""

    async def events(self, request: ImagesRequest, streamed: bool) -> AsyncIterator[Event]:
        raise AssertionError("it was asked")
        yield

    async def states(self) -> dict[str, dict[str, object]]:
        return {}


async def post(
    app: FastAPI, receive: Callable[[], Awaitable[Any]], sent: list[dict[str, Any]] | None = None
) -> int:
    """The status of a request whose body comes by `receive`; the answer goes to `sent`."""
    sent = [] if sent is None else sent
    headers = {"authorization": f"Bearer {KEY.key}", "content-type": "application/json"}
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/images/generations",
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        "client": ("127.0.0.1", 1),
    }

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return int(sent[0]["status"])


def test_a_full_key_s_body_is_not_read_before_the_answer() -> None:
    sent: list[dict[str, Any]] = []

    async def never() -> Any:
        await asyncio.Event().wait()

    async def unread() -> Any:
        assert sent[-1]["body"], "it was read"
        return {"type": "http.disconnect"}

    async def empty() -> Any:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def main() -> None:
        config = ServeConfig.model_validate(CONFIG)
        app = create_app(config, ImagesApi(config, Nobody()))
        first = asyncio.create_task(post(app, never))
        await asyncio.sleep(0.1)
        assert await post(app, unread, sent) == 429
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        assert await post(app, empty) == 400  # its place is free again

    asyncio.run(main())
