"""Requests of several passes, and models that need masks, in the engine's loop."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from rayjobs.diffusion.engine import Engine
from rayjobs.diffusion.model import Model
from rayjobs.diffusion.passes import Pass
from rayjobs.diffusion.request import Request
from serve.config import ServeConfig
from serve.engine.loop import EngineLoop
from serve.images import to_image
from serve.protocol import Failed, Finished, Partial, Step
from serve.registry import Registry
from tests.families import save_inpainting
from tests.serving.engine.loops import all_of, make_request, of_kind

pytestmark = pytest.mark.model


def loop_of(folder: Path) -> EngineLoop:
    keys: dict[str, Any] = {
        "models": [{"name": "tiny", "uri": str(folder)}],
        "engine": {"max_rows": 2, "deterministic": True},
    }
    config = ServeConfig.model_validate(keys)
    return EngineLoop(config.engine, Registry(config))


def test_requests_of_several_passes(tiny: Model, folders: dict[str, Path]) -> None:
    passes = (Pass(scale=1.5, strength=0.5, steps=6),)
    several = make_request(
        model="tiny", steps=4, seeds=(1, 2), passes=passes, progress=True, partial_images=3
    )

    async def work() -> Any:
        loop = loop_of(folders["sdxl"])
        try:
            both = await asyncio.gather(
                all_of(loop, several), all_of(loop, make_request(model="tiny", width=96, height=96))
            )
            assert loop.pending_s() == 0
            return both
        finally:
            await loop.close()

    events, others = asyncio.run(work())
    assert not of_kind(others, Failed)
    made = {event.seed: to_image(event.pixels) for event in of_kind(events, Finished)}
    asked = [Request(prompt="a red star", seed=n, steps=4, passes=passes) for n in (1, 2)]
    for result in Engine(tiny, 2).generate(asked):
        assert result.image is not None
        assert made[result.request.seed].size == (96, 96)
        assert made[result.request.seed].tobytes() == result.image.tobytes()
    steps = [event for event in of_kind(events, Step) if event.image == 0]
    assert [(step.done, step.total) for step in steps] == [(n, 7) for n in range(1, 8)]
    partials = [event.index for event in of_kind(events, Partial) if event.image == 0]
    assert partials == [0, 1, 2]


def test_an_inpainting_model_is_warmed(folders: dict[str, Path], tmp_path: Path) -> None:
    async def work() -> Any:
        loop = loop_of(save_inpainting(folders["sdxl"], tmp_path / "fill"))
        try:
            await loop.warm_up("tiny")
            assert loop.facts()["tiny"].needs_mask
            return await all_of(loop, make_request(model="tiny"))
        finally:
            await loop.close()

    (failed,) = of_kind(asyncio.run(work()), Failed)
    assert "give init_image and mask" in failed.message
