"""The engine loop with the starter model: shared steps, leaving, deadlines, full replicas."""

import asyncio
import threading
from typing import Any

import numpy as np
import pytest
import torch

from rayjobs.diffusion.engine import Engine
from rayjobs.diffusion.model import Model
from rayjobs.diffusion.modules.replay import Replay
from rayjobs.diffusion.request import Request
from serve.config import ServeConfig
from serve.engine.loop import EngineLoop
from serve.images import to_image
from serve.protocol import TOO_LATE, Event, Failed, Finished, Partial, Step, Waiting
from serve.registry import Registry
from tests.serving.engine.loops import (
    STARTER,
    all_of,
    eventually,
    loaded_once,
    make_request,
    of_kind,
    run,
    running,
)

__all__ = ["loaded_once"]

pytestmark = pytest.mark.model

LONG = "a (red:1.3) star, " * 30


def test_images_are_the_engine_s_own(starter: Model) -> None:
    async def work() -> list[list[Event]]:
        async with running() as loop:
            requests = [
                make_request(seeds=(1, 2), steps=5, sampler="euler"),
                make_request(seeds=(3,), steps=9, guidance_scale=1.0, sampler="ddim"),
                make_request(seeds=(4,), steps=4, width=96, height=64),
                make_request(seeds=(5,), steps=5, prompt=LONG, prompt_syntax="a1111"),
                make_request(seeds=(6,), steps=6, guidance_interval=(0.2, 0.6), cache_interval=3),
                make_request(seeds=(7,), steps=2, timesteps=(800, 300), sampler="euler"),
            ]
            return await asyncio.gather(*(all_of(loop, each) for each in requests))

    answers = run(work())
    alone = [
        Request(prompt="a red star", seed=2, steps=5, sampler="euler"),
        Request(prompt="a red star", seed=3, steps=9, guidance_scale=1.0, sampler="ddim"),
        Request(prompt="a red star", seed=4, steps=4, width=96, height=64),
        Request(prompt=LONG, prompt_syntax="a1111", seed=5, steps=5),
        Request(
            prompt="a red star", seed=6, steps=6, guidance_interval=(0.2, 0.6), cache_interval=3
        ),
        Request(prompt="a red star", seed=7, timesteps=(800, 300), sampler="euler"),
    ]
    for events, request in zip(answers, alone, strict=True):
        made = {event.seed: event for event in of_kind(events, Finished)}
        (result,) = Engine(starter, max_rows=1).generate([request])
        expected = np.asarray(result.image, int)
        got = np.asarray(to_image(made[request.seed].pixels), int)
        assert np.abs(got - expected).max() <= 1
    assert len(of_kind(answers[0], Finished)) == 2


def test_deterministic_pictures_have_the_bits_of_a_job(
    starter: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mixed requests that join and leave each other's steps; the job's batch has another order.

    Calls of other sizes, and texts said twice beside longer ones, move bits only now and then, so
    that these are looked for, too.
    """
    sizes_seen, call = set(), Replay.__call__

    def seen(self: Replay, x_PCHW: torch.Tensor, t_P: torch.Tensor, *rest: Any) -> torch.Tensor:
        text_PLD = rest[0]["encoder_hidden_states"]
        first, *more = text_PLD.unflatten(1, (-1, 77)).flatten(2).unbind(1)
        assert not any(((first == other).all(1) & first.any(1)).any() for other in more)
        sizes_seen.add(len(x_PCHW))
        return call(self, x_PCHW, t_P, *rest)

    monkeypatch.setattr(Replay, "__call__", seen)
    sizes = [(64, 64), (96, 64)]
    keys: list[dict[str, Any]] = [
        {
            "prompt": f"a {('red', 'blue', 'green')[number % 3]} star",
            "steps": 2 + number % 5,
            "sampler": ("euler", "dpmpp_2m", "euler_a")[number % 3],
            "guidance_scale": (5.0, 1.0, 7.5, 3.0)[number % 4],
            "width": sizes[number % 2][0],
            "height": sizes[number % 2][1],
            **({"prompt": f"a ring, {LONG}", "prompt_syntax": "a1111"} if number % 5 == 4 else {}),
        }
        for number in range(8)
    ]

    async def ask(loop: EngineLoop, number: int) -> Any:
        await asyncio.sleep(0.1 * (number % 4))
        events = await all_of(loop, make_request(seeds=(number,), **keys[number]))
        (made,) = of_kind(events, Finished)
        return np.asarray(to_image(made.pixels))

    async def work() -> list[Any]:
        async with running(deterministic=True) as loop:
            return await asyncio.gather(*(ask(loop, number) for number in range(len(keys))))

    served = run(work())
    assert sizes_seen == {8}
    requests = [Request(seed=number, **each) for number, each in enumerate(keys)]
    for result in Engine(starter, max_rows=4).generate(requests[::-1]):
        assert (np.asarray(result.image) == served[result.request.seed]).all()


def test_a_caller_sees_the_picture_form() -> None:
    async def work() -> list[Event]:
        async with running() as loop:
            return await all_of(loop, make_request(partial_images=3, progress=True, steps=8))

    events = run(work())
    assert [event.index for event in of_kind(events, Partial)] == [0, 1, 2]
    assert [event.done for event in of_kind(events, Step)] == list(range(1, 9))
    assert isinstance(events[0], Waiting)
    assert isinstance(events[-1], Finished)


def test_a_caller_who_leaves_takes_the_rows_along() -> None:
    async def work() -> None:
        async with running() as loop:
            stream = loop.generate(make_request(steps=900, seeds=(1, 2, 3), progress=True))
            async for event in stream:
                if isinstance(event, Step):
                    break
            (loaded,) = loop.models.loaded.values()
            assert len(loaded.engine.rows) == 3
            assert loop.load() == {"starter": (3, 0)}
            await stream.aclose()
            await eventually(lambda: not loop.load())
            await eventually(lambda: not loaded.engine.rows)
            await eventually(lambda: loaded.users == 0)
            assert 'outcome="cancelled"} 1.0' in loop.metrics.text()
            assert "cancelled_rows_total 3.0" in loop.metrics.text()
            assert not loaded.batcher.priorities

    run(work())


def test_a_short_ask_is_not_stuck_behind_long_ones() -> None:
    async def work() -> None:
        # However slow the machine is just now, none of them is refused.
        async with running(max_rows=2, max_pending_s=9000) as loop:
            long = [asyncio.create_task(all_of(loop, make_request(steps=300))) for _ in range(6)]
            await asyncio.sleep(0.3)
            assert of_kind(await all_of(loop, make_request(steps=3)), Finished)
            assert not any(task.done() for task in long)
            for task in long:
                task.cancel()
            await asyncio.gather(*long, return_exceptions=True)

    run(work())


def test_a_size_whose_step_all_would_wait_for_is_refused() -> None:
    """By what is known of other sizes, or once its own steps are known; its own size never is."""

    async def work() -> None:
        async with running(max_step_s=0.5) as loop:
            (loaded,) = loop.models.loaded.values()
            forecast, own = loop.stepper.forecast, loaded.own_shape
            for slots in 100 * (2, 8):  # as often as makes it forget what it measured itself
                forecast.observe_step(loaded.key(own), slots, 0.01 * slots)
            (failed,) = await all_of(loop, make_request(width=1024, height=1024))
            assert (failed.kind, failed.param) == ("invalid", "size")
            assert "a step of 1024x1024 takes about" in failed.message
            stream = loop.generate(make_request(width=96, height=96, steps=900))
            assert isinstance(await anext(stream), Waiting)
            await eventually(lambda: bool(forecast.known_step_s(loaded.key((4, 24, 24)), 2)))
            for _ in range(9):
                forecast.observe_step(loaded.key((4, 24, 24)), 2, 900.0)
            (failed,) = [event async for event in stream]
            assert (failed.kind, failed.param) == ("invalid", "size")
            for _ in range(3):
                forecast.observe_step(loaded.key(own), 2, 9.0)
            assert of_kind(await all_of(loop, make_request()), Finished)

    run(work())


def test_a_model_that_nothing_is_known_of_is_measured_first() -> None:
    async def work() -> None:
        config = ServeConfig.model_validate(STARTER | {"engine": {"max_step_s": 0.001}})
        loop = EngineLoop(config.engine, Registry(config))
        try:
            (failed,) = await all_of(loop, make_request(width=2048, height=1024))
            assert (failed.kind, failed.param) == ("invalid", "size")
        finally:
            await loop.close()

    run(work())


def test_a_deadline_holds_during_a_long_step() -> None:
    async def work() -> None:
        async with running() as loop:
            (loaded,) = loop.models.loaded.values()
            go, predict = threading.Event(), loaded.engine._predict_noise

            def wait(rows: list[Any]) -> Any:
                go.wait(20)
                return predict(rows)

            loaded.engine._predict_noise = wait  # type: ignore[method-assign]
            try:
                events = await all_of(loop, make_request(deadline_s=0.2))
            finally:
                go.set()
            assert events[-1] == TOO_LATE
            await eventually(lambda: not loaded.engine.rows)

    run(work())


def test_a_deadline_ends_the_rows() -> None:
    async def work() -> None:
        async with running() as loop:
            events = await all_of(loop, make_request(steps=1000, deadline_s=0.3))
            assert [event.kind for event in of_kind(events, Failed)] == ["deadline"]
            (loaded,) = loop.models.loaded.values()
            await eventually(lambda: not loaded.engine.rows)

    run(work())


def test_a_full_replica_says_when_to_come_again() -> None:
    async def work() -> None:
        async with running(max_pending_s=2.0) as loop:
            requests = [make_request(steps=200, seeds=tuple(range(8))) for _ in range(20)]
            tasks = [asyncio.create_task(all_of(loop, each)) for each in requests]
            await asyncio.sleep(1)
            answers = [task.result() for task in tasks if task.done()]
            refused = [event for events in answers for event in of_kind(events, Failed)]
            assert refused
            assert all(event.kind == "busy" and event.retry_after_s > 0 for event in refused)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await eventually(lambda: loop.pending_s() == 0)

    run(work())


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"model": "nobody"}, "the model 'nobody' does not exist"),
        ({"loras": (("nobody", 1.0),)}, "a LoRA of this request no longer exists"),
        ({"sampler": "edm_euler"}, "does not fit a model that is not EDM"),
        ({"width": 12}, "multiple of 8"),
    ],
)
def test_what_cannot_be_served_is_told(keys: dict[str, Any], told: str) -> None:
    async def work() -> list[Event]:
        async with running() as loop:
            return await all_of(loop, make_request(**keys))

    (failed,) = run(work())
    assert failed.kind == "invalid"
    assert told in failed.message


def test_nothing_is_left_of_many_who_leave() -> None:
    async def leave(loop: EngineLoop, number: int) -> None:
        stream = loop.generate(make_request(steps=50, seeds=(number,), progress=True))
        async for _ in stream:
            if number % 3:
                break
        await stream.aclose()

    async def work() -> None:
        async with running() as loop:
            for first in range(0, 200, 20):
                await asyncio.gather(
                    *(leave(loop, first + n) for n in range(20) if (first + n) % 3)
                )
            (loaded,) = loop.models.loaded.values()
            await eventually(lambda: not loaded.engine.rows)
            assert loop.pending_s() == 0
            assert not loaded.batcher.priorities
            assert loaded.users == 0
            assert len(asyncio.all_tasks()) == 2

    run(work())
