"""The engine replicas as the ingress sees them: one stream of events for each request.

Owns what happens when a replica dies: a request without visible output is sent to another replica.
The result is the same, because an image depends on its seed only. Knows Ray, but no HTTP.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from ray.exceptions import ObjectLostError, RayActorError, RayTaskError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
)

from serve.errors import ApiError
from serve.protocol import Event, Failed, Finished, ImagesRequest, Partial

ATTEMPTS = 5
LOST = (RayActorError, ObjectLostError, ReplicaUnavailableError)
BUSY_ATTEMPTS, BROKEN_ATTEMPTS = 2, 2
STATE_TIMEOUT_S = 10.0
"""How long the replicas may take to report their state."""


class Fleet:
    """Calls the engine replicas; `handle` is the engine deployment's."""

    def __init__(self, handle: Any):
        self._stream = handle.options(method_name="generate", stream=True)
        self._handle = handle

    async def events(self, request: ImagesRequest, streamed: bool) -> AsyncIterator[Event]:
        """A request's events. Raises ApiError when no replica is available.

        It may wait for ever for a replica: the caller has the deadline.
        A request that is not `streamed` can be retried at any time: its events are then repeated.
        """
        started_s, busy, broken = time.monotonic(), 0, 0
        for attempt in range(ATTEMPTS):
            seen = False
            try:
                async for event in self._attempt(_with_time_left(request, started_s)):
                    if isinstance(event, Failed):
                        busy += event.kind == "busy"
                        broken += event.kind == "broken"
                        again = busy in range(1, BUSY_ATTEMPTS) or broken in range(
                            1, BROKEN_ATTEMPTS
                        )
                        if again and not seen and attempt < ATTEMPTS - 1:
                            break
                    seen = seen or (streamed and isinstance(event, Partial | Finished))
                    yield event
                else:
                    return
            except LOST as error:
                if seen or attempt == ATTEMPTS - 1:
                    raise ApiError(503, "the engine replica was lost", retry_after_s=5.0) from error
                await asyncio.sleep(0.2 * 2**attempt)

    async def _attempt(self, request: ImagesRequest) -> AsyncIterator[Event]:
        names = ",".join(request.names)
        events = self._stream.options(multiplexed_model_id=names).remote(request)
        try:
            async for event in events:
                yield event
        except BackPressureError as error:
            raise ApiError(429, "too many requests are waiting", retry_after_s=5.0) from error
        except DeploymentUnavailableError as error:
            raise ApiError(503, "the engine is not available", retry_after_s=5.0) from error
        except RayTaskError as error:
            if isinstance(error.cause, RayActorError):
                raise error.cause from error
            raise ApiError(500, "the engine failed", code="engine_failed") from error
        finally:
            events.cancel()

    async def states(self) -> dict[str, dict[str, Any]]:
        """Models, load and metrics of each replica that events, by its name."""
        try:
            states = await asyncio.wait_for(self._broadcast("state"), STATE_TIMEOUT_S)
        except (TimeoutError, Exception):
            return {}
        return {each["replica"]: each for each in states}

    async def _broadcast(self, method: str) -> list[Any]:
        responses = self._handle.broadcast(method)
        results: list[Any] = await responses.results_async(return_exceptions=True)
        return [each for each in results if not isinstance(each, BaseException)]


def _with_time_left(request: ImagesRequest, started_s: float) -> ImagesRequest:
    """The request with what is left of its deadline."""
    if request.deadline_s is None:
        return request
    left_s = request.deadline_s - (time.monotonic() - started_s)
    return replace(request, deadline_s=max(0.001, left_s))
