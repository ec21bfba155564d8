"""Limits over several ingress replicas, without Ray: the counts are in this process."""

import asyncio
from collections.abc import Awaitable
from typing import Any

import pytest

from serve.config import KeyConfig
from serve.limits.counts import SILENCE_S, Counts
from serve.limits.keeper import Limits

KEY = KeyConfig(name="team", key="k" * 20, max_concurrent=3, images_per_minute=6)


class Actor:
    """Counts that can be lost; they count what they are asked, too."""

    def __init__(self) -> None:
        self.counts = Counts()
        self.asked: list[str] = []
        self.is_gone = False

    def connect(self) -> Any:
        if self.is_gone:
            raise ConnectionError("it is gone")
        return self._ask

    def _ask(self, method: str, *args: Any) -> Awaitable[Any]:
        async def answer() -> Any:
            if self.is_gone:
                raise ConnectionError("it is gone")
            self.asked.append(method)
            return getattr(self.counts, method)(*args)

        return answer()


async def replicas(actor: Actor) -> tuple[Limits, Limits]:
    both = Limits(actor.connect), Limits(actor.connect)
    for each in both:
        await each.start()
    return both


def test_two_replicas_have_one_key_s_limits() -> None:
    async def main() -> None:
        one, other = await replicas(Actor())
        assert [await each.take(KEY, 1) for each in (one, other) * 3] == [0.0] * 6
        for each in (one, other):
            assert 5 <= await each.take(KEY, 1) <= 10
        entered = [await each.enter(KEY) for each in (one, other) * 2]
        assert entered == [True, True, True, False]
        one.leave(KEY)
        await asyncio.sleep(0.05)
        assert await other.enter(KEY)

    asyncio.run(main())


def test_a_large_rate_needs_few_calls() -> None:
    key = KeyConfig(name="team", key="k" * 20, images_per_minute=1200)

    async def main() -> None:
        actor = Actor()
        one, other = await replicas(actor)
        taken = 0
        while not await (one, other)[taken % 2].take(key, 1):
            taken += 1
        assert 1200 - 20 <= taken < 1200 + 60
        assert actor.asked.count("take") < taken / 10

    asyncio.run(main())


def test_a_replica_counts_alone_without_the_others(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        actor = Actor()
        one, other = await replicas(actor)
        assert one.is_shared
        assert await one.enter(KEY)
        actor.is_gone = True
        taken = [await each.take(KEY, 3) for each in (one, other) * 2]
        assert taken == [0.0] * 4  # a minute's images at each
        assert await one.take(KEY, 1) > 0
        assert not one.is_shared
        assert [await one.enter(KEY) for _ in range(3)] == [True, True, False]
        actor.is_gone, actor.counts = False, Counts()
        while not (one.is_shared and other.is_shared):
            await asyncio.sleep(0.05)
        assert not await other.enter(KEY)  # what was in progress is told to the new counts

    asyncio.run(main())
    told = [each.getMessage() for each in caplog.records if each.module == "keeper"]
    assert len(told) == 2  # once a replica
    assert "counts the limits of keys for itself" in told[0]


def test_a_replica_that_is_silent_holds_nothing() -> None:
    now_s = 0.0
    counts = Counts(lambda: now_s)
    assert counts.enter("a", "team", 2, 2)
    assert not counts.enter("b", "team", 1, 2)
    now_s = SILENCE_S + 1
    assert counts.enter("b", "team", 1, 2)


def test_what_is_refused_by_all_is_not_spent_here() -> None:
    async def main() -> None:
        one, other = await replicas(Actor())
        assert await one.take(KEY, 4) == 0
        assert await other.take(KEY, 4) > 0
        assert await other.take(KEY, 2) == 0

    asyncio.run(main())
