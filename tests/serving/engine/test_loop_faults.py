"""The engine loop where something fails: a step, a decode, a check, the device's memory."""

import asyncio
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any

import pytest
import torch

from rayjobs.diffusion.faults import DeviceLost
from rayjobs.diffusion.vae import worker
from serve.engine import safety
from serve.engine.pacer import Pacer
from serve.protocol import Failed, Finished
from tests.serving.engine.loops import (
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


def test_a_failed_engine_answers_at_once() -> None:
    async def work() -> None:
        async with running() as loop:
            (loaded,) = loop.models.loaded.values()

            def fail() -> None:
                raise DeviceLost("the device is gone")

            task = asyncio.create_task(all_of(loop, make_request(steps=900)))
            await asyncio.sleep(0.2)
            loaded.engine.step = fail  # type: ignore[method-assign,assignment]
            assert [event.kind for event in of_kind(await task, Failed)] == ["broken"]
            (late,) = await all_of(loop, make_request())
            assert isinstance(late, Failed)
            assert late.kind == "broken"
            assert isinstance(loop.failure, DeviceLost)
            loop.stepper.failure = None

    run(work())


def test_a_step_that_fails_ends_its_own_rows_only() -> None:
    async def work() -> None:
        async with running() as loop:
            (loaded,) = loop.models.loaded.values()
            predict, calls = loaded.engine._predict_noise, [0]

            def fail_once(rows: list[Any]) -> Any:
                calls[0] += 1
                if calls[0] == 3:
                    raise RuntimeError("shapes do not match")
                return predict(rows)

            loaded.engine._predict_noise = fail_once  # type: ignore[method-assign]
            (failed,) = of_kind(await all_of(loop, make_request(steps=20)), Failed)
            assert failed.kind == "broken"
            assert of_kind(await all_of(loop, make_request(steps=3)), Finished)
            assert not loaded.engine.rows
            assert not loaded.batcher.priorities

    run(work())


def test_a_picture_that_does_not_fit_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    decode = worker.decode_latents

    def full(z_BCHW: Any, model: Any) -> Any:
        if z_BCHW.shape[-1] == 24:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(z_BCHW, model)

    monkeypatch.setattr(worker, "decode_latents", full)

    async def work() -> None:
        async with running() as loop:
            large, small = await asyncio.gather(
                all_of(loop, make_request(width=96, height=64)),
                all_of(loop, make_request(steps=30)),
            )
            (failed,) = of_kind(large, Failed)
            assert "out of memory" in failed.message
            assert of_kind(small, Finished)

    run(work())


class Gate:
    """A safety checker that waits, and finds the image of one turn unsafe."""

    device = "cuda:0"

    def __init__(self) -> None:
        self.unsafe, self.turns, self.threads = -1, count(), set[str]()
        self.is_open = threading.Event()
        self.is_open.set()

    def allows(self, image: Any) -> bool:
        self.threads.add(threading.current_thread().name)
        assert self.is_open.wait(30)
        return next(self.turns) != self.unsafe


def test_images_are_checked_beside_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others are made meanwhile, nobody who has left is answered, and each has its own verdict."""
    monkeypatch.setattr(safety, "beside_steps", lambda _, name: ThreadPoolExecutor(1, name))
    gate = Gate()
    wanted = {2: (1, 2), 9: (3,), 3: (4,)}

    async def work() -> None:
        async with running(gate) as loop:
            (loaded,) = loop.models.loaded.values()
            gate.is_open.clear()
            gate.turns, gate.unsafe = count(), 4
            left = asyncio.create_task(all_of(loop, make_request(steps=2)))
            await eventually(lambda: len(loop.stepper._checks._waiting) == 1)
            left.cancel()
            asked = [make_request(steps=steps, seeds=seeds) for steps, seeds in wanted.items()]
            tasks = [asyncio.create_task(all_of(loop, each)) for each in asked]
            await eventually(lambda: not loaded.engine.num_pending and loaded.users == 3)
            assert not any(task.done() for task in tasks), "their images are not checked yet"
            gate.is_open.set()
            two, refused, safe = await asyncio.gather(*tasks)
            assert [event.seed for event in of_kind(two, Finished)] == [1, 2]
            assert [event.kind for event in of_kind(refused, Failed)] == ["refused"]
            assert [event.seed for event in of_kind(safe, Finished)] == [4]
            await eventually(lambda: not loaded.users)
        assert gate.threads == {"safety_0"}

    run(work())


def test_memory_is_given_back_after_the_call_s_tensors_are_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held: list[Any] = []
    alive: list[bool] = []

    def full(rows: list[Any]) -> Any:
        activations = torch.empty(8)
        held.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Pacer, "clear", lambda _: alive.append(held[-1]() is not None))

    async def work() -> None:
        async with running() as loop:
            (loaded,) = loop.models.loaded.values()
            loaded.engine._unet_batch.predict_noise = full  # type: ignore[method-assign]
            (failed,) = of_kind(await all_of(loop, make_request()), Failed)
            assert "does not fit" in failed.message
            assert alive == [False]

    run(work())
