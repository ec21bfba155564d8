"""A key's limits as one ingress replica keeps them: its own counts, and those of all replicas.

Owns what happens when the shared counts cannot be asked: the replica counts for itself, says so,
and looks for them again. Nothing here is waited for longer than a moment. Knows neither Ray nor
HTTP.
"""

import asyncio
import contextlib
import logging
import uuid
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from typing import Any

from serve.config import KeyConfig
from serve.limits.counts import MINUTE_S, Counts, Lease

Ask = Callable[..., Awaitable[Any]]
"""Calls a method of the shared counts, by its name."""
ANSWER_S = 1.0
"""How long an answer may take; one takes about a millisecond."""
START_S = 10.0
"""How long a replica that begins waits for the shared counts."""
REPORT_S = 1.0
AHEAD_S = 1.0
"""A lease has a key's images of so long more than were asked for: what comes next needs no call."""


class Limits:
    """Admits requests and images. `connect` finds the shared counts; None: there is one replica."""

    def __init__(self, connect: Callable[[], Ask] | None = None):
        self._connect = connect
        self._ask: Ask | None = None
        self._here = Counts()
        self._active: Counter[str] = Counter()
        self._leased: defaultdict[str, float] = defaultdict(float)
        self._name = uuid.uuid4().hex
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def is_shared(self) -> bool:
        """Whether the limits hold over all replicas."""
        return self._connect is None or self._ask is not None

    async def start(self) -> None:
        """Find the shared counts, and from then on keep to them."""
        if self._connect is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(START_S):
                    await self._find()
            self._task = asyncio.create_task(self._keep())

    async def enter(self, key: KeyConfig) -> bool:
        """Whether a request may begin; it ends with `leave`."""
        if self._active[key.name] >= key.max_concurrent:
            return False
        self._active[key.name] += 1
        try:
            args = (self._name, key.name, self._active[key.name], key.max_concurrent)
            is_in = await self._shared("enter", *args) is not False
        except BaseException:
            self.leave(key)
            raise
        if not is_in:
            self.leave(key)
        return is_in

    def leave(self, key: KeyConfig) -> None:
        self._active[key.name] -= 1
        self._changed.set()

    async def take(self, key: KeyConfig, images: int) -> float:
        """Take images; 0, or the seconds after which there will be as many."""
        if key.images_per_minute is None:
            return 0.0
        # What is too much for one replica needs no call: whoever asks without end costs nothing.
        own = self._here.take(key.name, images, key.images_per_minute)
        if own.wait_s:
            return own.wait_s
        lease = await self._lease(key.name, min(images, key.images_per_minute), key)
        if lease.wait_s:
            self._here.give_back(key.name, own.images, key.images_per_minute)
        return lease.wait_s

    async def _lease(self, name: str, images: float, key: KeyConfig) -> Lease:
        rate = key.images_per_minute or 0.0
        held = min(images, self._leased[name])
        self._leased[name] -= held
        if held == images:
            return Lease(images)
        ahead = rate * AHEAD_S // MINUTE_S  # whole ones: a part of one serves nobody
        lease: Lease | None = await self._shared("take", name, images - held, rate, ahead)
        if lease is None:
            return Lease(images)
        self._leased[name] += held if lease.wait_s else lease.images - (images - held)
        return lease

    async def _shared(self, method: str, *args: Any) -> Any:
        """An answer of the shared counts; None where there are none."""
        if self._ask is None:
            return None
        try:
            async with asyncio.timeout(ANSWER_S):
                return await self._ask(method, *args)
        except Exception as error:
            self._lose(error)
            return None

    async def _keep(self) -> None:
        """Report what is in progress, after each change and now and then; find what was lost."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REPORT_S):
                    await self._changed.wait()
            self._changed.clear()
            if self._ask is None:
                await self._find()
            await self._shared("report", self._name, dict(+self._active))

    async def _find(self) -> None:
        assert self._connect is not None
        try:
            ask = await asyncio.to_thread(self._connect)
            async with asyncio.timeout(START_S):
                await ask("report", self._name, dict(+self._active))
        except Exception as error:
            _log().debug("no shared counts: %r", error)
            await asyncio.sleep(REPORT_S)
        else:
            self._ask = ask
            _log().info("the limits of keys are counted over all ingress replicas")

    def _lose(self, error: Exception) -> None:
        if self._ask is not None:
            self._ask = None
            self._leased.clear()
            _log().warning(
                "the shared counts do not answer (%s): until they do, this ingress replica counts "
                "the limits of keys for itself",
                type(error).__name__,
            )


def _log() -> logging.Logger:
    return logging.getLogger("rayjobs")
