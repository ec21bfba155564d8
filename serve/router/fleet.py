"""The engine replicas as the ingress sees them: one stream of events for each ask.

Owns what happens when a replica dies: asks of which nothing was seen yet are made again elsewhere,
which changes nothing, since a seed decides its picture. Knows Ray, but no HTTP.
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
from serve.protocol import Ask, Event, Failed, Finished, Partial

ATTEMPTS = 5
LOST = (RayActorError, ObjectLostError, ReplicaUnavailableError)
BUSY_ATTEMPTS, BROKEN_ATTEMPTS = 2, 2
GRACE_S = 2.0
"""How long after its deadline an ask's own word is waited for."""
ASKED_AGAIN_S = 10.0
"""How long a replica may take to say what it holds."""


class Fleet:
    """`handle` is that of the engine deployment."""

    def __init__(self, handle: Any):
        self._stream = handle.options(method_name="generate", stream=True)
        self._handle = handle

    async def events(self, ask: Ask, streamed: bool) -> AsyncIterator[Event]:
        """What becomes of an ask. Raises ApiError when no replica can be had.

        Not `streamed`, an ask can be made again at any time: what was collected is told again.
        """
        started_s, busy, broken = time.monotonic(), 0, 0
        for attempt in range(ATTEMPTS):
            seen = False
            try:
                async for event in self._attempt(_later(ask, started_s)):
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
                    raise ApiError(503, "the engine was lost", retry_after_s=5.0) from error
                await asyncio.sleep(0.2 * 2**attempt)

    async def _attempt(self, ask: Ask) -> AsyncIterator[Event]:
        started_s = time.monotonic()
        names = ",".join([ask.model, *(name for name, _ in ask.loras)])
        answers = self._stream.options(multiplexed_model_id=names).remote(ask)
        try:
            while True:
                left_s = None if ask.deadline_s is None else _left_s(ask, started_s) + GRACE_S
                yield await asyncio.wait_for(anext(answers), left_s)
        except StopAsyncIteration:
            return
        except TimeoutError:  # no replica was there to say so
            yield Failed("deadline", "the deadline has passed before an engine was there")
        except BackPressureError as error:
            raise ApiError(429, "too many requests are waiting", retry_after_s=5.0) from error
        except DeploymentUnavailableError as error:
            raise ApiError(503, "the engine is not available", retry_after_s=5.0) from error
        except RayTaskError as error:
            if isinstance(error.cause, RayActorError):
                raise error.cause from error
            raise ApiError(500, "the engine has failed", code="engine_failed") from error
        finally:
            answers.cancel()

    async def states(self) -> dict[str, dict[str, Any]]:
        """What each replica holds and has waiting, by its name; those that do not answer lack."""
        try:
            found = await asyncio.wait_for(self._told("state"), ASKED_AGAIN_S)
        except (TimeoutError, Exception):
            return {}
        return {each["replica"]: each for each in found}

    async def _told(self, method: str) -> list[Any]:
        asked = self._handle.broadcast(method)
        found: list[Any] = await asked.results_async(return_exceptions=True)
        return [each for each in found if not isinstance(each, BaseException)]


def _later(ask: Ask, started_s: float) -> Ask:
    """The ask with what is left of its deadline."""
    return ask if ask.deadline_s is None else replace(ask, deadline_s=_left_s(ask, started_s))


def _left_s(ask: Ask, started_s: float) -> float:
    return max(0.001, (ask.deadline_s or 0.0) - (time.monotonic() - started_s))
