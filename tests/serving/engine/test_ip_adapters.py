"""IP-Adapters of requests: loaded beside the model, evicted by bytes, refused where unfit."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from rayjobs.diffusion.engine import Engine
from rayjobs.diffusion.model import Model
from rayjobs.diffusion.request import IpAdapter, Request
from serve.config import ServeConfig
from serve.engine.loop import EngineLoop
from serve.images import to_image, to_pixels
from serve.protocol import Failed, Finished, ImagesRequest, IpAdapterUse
from serve.registry import Registry

pytestmark = pytest.mark.model


def test_requests_with_ip_adapters(
    tiny: Model, folders: dict[str, Path], tmp_path: Path, picture: Callable[[int], Image.Image]
) -> None:
    from tests.ip_adapters import save_encoder, save_ip_adapters

    files = save_ip_adapters(folders["sdxl"], tmp_path / "sdxl")
    other = save_ip_adapters(folders["sd"], tmp_path / "sd")["plain"]
    encoder = save_encoder(tmp_path / "encoder")
    of_encoder = sum(file.stat().st_size for file in Path(encoder).glob("*.safetensors"))
    size = Path(files["plus"]).stat().st_size + of_encoder
    named = {"one": files["plain"], "two": files["plus"], "other": other}
    config = ServeConfig.model_validate(
        {
            "models": [{"name": "tiny", "uri": str(folders["sdxl"])}],
            "ip_adapters": [
                {"name": name, "uri": path, "encoder": encoder} for name, path in named.items()
            ],
            # Room for one of them.
            "engine": {
                "max_rows": 2,
                "deterministic": True,
                "ip_adapter_memory_gb": 1.02 * size / 2**30,
            },
        }
    )

    async def ask(loop: EngineLoop, *names: str) -> Any:
        uses = tuple(IpAdapterUse(name=n, pixels=to_pixels(picture(1)), scale=0.8) for n in names)
        request = ImagesRequest(
            id="1", caller="me", model="tiny", prompt="a star", steps=3, ip_adapters=uses
        )
        return [event async for event in loop.generate(request)][-1]

    async def work() -> None:
        loop = EngineLoop(config.engine, Registry(config))
        try:
            first = await ask(loop, "one")
            assert loop.names() == ["tiny", "one"]
            again, plain = await asyncio.gather(ask(loop, "one"), ask(loop))
            assert again.pixels.data == first.pixels.data != plain.pixels.data
            use = IpAdapter(path=files["plain"], encoder=encoder, image=picture(1), scale=0.8)
            (alone,) = Engine(tiny, 2).generate(
                [Request(prompt="a star", steps=3, ip_adapters=(use,))]
            )
            assert to_image(first.pixels).tobytes() == alone.image.tobytes()
            assert isinstance(await ask(loop, "two"), Finished)
            assert loop.names() == ["tiny", "two"]
            for names, kind, message in (
                (("one", "two"), "busy", "fill engine.ip_adapter_memory_gb"),
                (("other",), "invalid", "plain.safetensors is not for this model"),
                (("gone",), "invalid", "an IP-Adapter of this request no longer exists"),
            ):
                failed = await ask(loop, *names)
                assert isinstance(failed, Failed)
                assert failed.kind == kind
                assert message in failed.message
        finally:
            await loop.close()
        assert loop.failure is None

    asyncio.run(work())
