"""Streams of events that stay open: the first event is waited for, and silence is filled.

Owns what a proxy between a caller and this API needs. Knows nothing of what the events mean.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from typing import TypeVar

from fastapi.sse import KEEPALIVE_COMMENT

PING_S = 15.0
"""Time without an event after which a comment is sent: proxies end a silent connection, nginx after
60 s. As of FastAPI's own streams."""

T = TypeVar("T")


async def begin(events: AsyncIterator[T]) -> tuple[T | None, AsyncGenerator[T]]:
    """The first event, or None where it takes longer than PING_S; and all events, it included."""
    first = asyncio.ensure_future(anext(events, None))
    try:
        await asyncio.wait({first}, timeout=PING_S)
    except BaseException:
        await _drop(first)
        raise
    return first.result() if first.done() else None, _chain(first, events)


async def keep_alive(
    stream: AsyncGenerator[bytes], until_s: float, late: bytes
) -> AsyncGenerator[bytes]:
    """The stream, a comment wherever it is silent, and `late` at `until_s` of the event loop."""
    loop = asyncio.get_running_loop()
    pending: asyncio.Future[bytes | None] | None = None
    try:
        while True:
            pending = pending or asyncio.ensure_future(anext(stream, None))
            left_s = until_s - loop.time()
            await asyncio.wait({pending}, timeout=max(0.0, min(PING_S, left_s)))
            if pending.done():
                data, pending = pending.result(), None
                if data is None:
                    return
                yield data
            elif left_s > PING_S:
                yield KEEPALIVE_COMMENT
            else:
                yield late
                return
    finally:
        if pending is not None:
            await _drop(pending)
        await stream.aclose()


async def _chain(first: asyncio.Future[T | None], rest: AsyncIterator[T]) -> AsyncGenerator[T]:
    event = await first
    while event is not None:
        yield event
        event = await anext(rest, None)


async def _drop(pending: asyncio.Future[T]) -> None:
    """End what is waited for, and wait until it has ended: what it holds is then free."""
    pending.cancel()
    with contextlib.suppress(asyncio.CancelledError, Exception):
        await pending
