"""ControlNets of requests: loaded beside the model, evicted by bytes, refused where unfit."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from rayjobs.diffusion.engine import Engine
from rayjobs.diffusion.model import Model
from rayjobs.diffusion.request import Control, Request
from serve.config import ServeConfig
from serve.engine.loop import EngineLoop
from serve.images import to_image, to_pixels
from serve.protocol import ControlUse, Failed, Finished, ImagesRequest
from serve.registry import Registry

pytestmark = pytest.mark.model


def test_requests_with_controls(
    tiny: Model, folders: dict[str, Path], tmp_path: Path, picture: Callable[[int], Image.Image]
) -> None:
    from tests.controls import save_controlnets

    paths = save_controlnets(folders["sdxl"], tmp_path) + save_controlnets(
        folders["sd"], tmp_path / "sd", 1
    )
    size = sum(file.stat().st_size for file in Path(paths[0]).glob("*.safetensors"))
    config = ServeConfig.model_validate(
        {
            "models": [{"name": "tiny", "uri": str(folders["sdxl"])}],
            "controls": [
                {"name": name, "uri": path}
                for name, path in zip(("one", "two", "other"), paths, strict=True)
            ],
            # Room for one of them.
            "engine": {
                "max_rows": 2,
                "deterministic": True,
                "control_memory_gb": 1.5 * size / 2**30,
            },
        }
    )

    async def ask(loop: EngineLoop, *names: str) -> Any:
        uses = tuple(ControlUse(name=n, pixels=to_pixels(picture(1)), scale=1.5) for n in names)
        request = ImagesRequest(
            id="1", caller="me", model="tiny", prompt="a star", steps=3, controls=uses
        )
        return [event async for event in loop.generate(request)][-1]

    async def work() -> None:
        loop = EngineLoop(config.engine, Registry(config))
        try:
            assert loop.names() == []
            first = await ask(loop, "one")
            assert loop.names() == ["tiny", "one"]
            again, plain = await asyncio.gather(ask(loop, "one"), ask(loop))
            assert again.pixels.data == first.pixels.data != plain.pixels.data
            control = Control(path=paths[0], image=picture(1), scale=1.5)
            asked = Request(prompt="a star", steps=3, controls=(control,))
            (alone,) = Engine(tiny, 2).generate([asked])
            assert to_image(first.pixels).tobytes() == alone.image.tobytes()
            assert isinstance(await ask(loop, "two"), Finished)
            assert loop.names() == ["tiny", "two"]
            for names, kind, message in (
                (("one", "two"), "busy", "fill engine.control_memory_gb"),
                (("other",), "invalid", "net-0 is not for this model: its cross_attention_dim"),
                (("gone",), "invalid", "a ControlNet of this request no longer exists"),
            ):
                failed = await ask(loop, *names)
                assert isinstance(failed, Failed)
                assert failed.kind == kind
                assert message in failed.message
        finally:
            await loop.close()
        assert loop.failure is None

    asyncio.run(work())
