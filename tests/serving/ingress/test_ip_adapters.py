"""Reference pictures in a request's body: decoded, and every mistake told by its field."""

import base64
from collections.abc import Callable
from typing import Any

from PIL import Image

from rayjobs.images.encode import encode_picture
from serve.protocol import IpAdapterUse
from tests.serving.asking import ask
from tests.serving.in_process import QuickEngines, serving

IP_ADAPTERS = [
    {"name": "style", "uri": "style.safetensors", "encoder": "encoder"},
    {"name": "far", "uri": "far.safetensors", "encoder": "encoder", "base": "second"},
]
MODELS = [{"name": "starter", "uri": "starter"}, {"name": "second", "uri": "starter"}]


def test_reference_pictures(picture: Callable[[int], Image.Image]) -> None:
    text = base64.b64encode(encode_picture(picture(1), "png", 95, None)).decode()
    engines = QuickEngines()
    controls = [{"name": "edges", "uri": "nets/edges"}]
    with serving(engines, models=MODELS, ip_adapters=IP_ADAPTERS, controls=controls) as url:

        def told(*uses: dict[str, Any], **more: Any) -> tuple[int, str]:
            status, _, body = ask(url, body={"prompt": "a star", "ip_adapters": uses, **more})
            return status, str(body.get("error", {}).get("message"))

        good = {"name": "style", "image": text}
        assert told(good | {"scale": 0.7}, good, cache_interval=2)[0] == 200
        one, two = engines.asked[-1].ip_adapters
        assert isinstance(one, IpAdapterUse)
        assert one.pixels.data == picture(1).tobytes()
        assert [(use.name, use.scale) for use in (one, two)] == [("style", 0.7), ("style", 1.0)]
        for status, message, wrong in (
            (404, "The IP-Adapter 'edges' does not exist", {"name": "edges"}),
            (400, "'far' is for another model, second", {"name": "far"}),
            (400, "It is not base64", {"image": "!"}),
            (400, "The ip_adapters is no PNG, JPEG or WebP", {"image": "aGVsbG8gd29ybGQ="}),
            (400, "ip_adapters is 9; at most 4", {"scale": 9.0}),
            (400, "Unknown parameter: 'ip_adapters.0.start'", {"start": 0.5}),
        ):
            given, said = told(good | wrong)
            assert (given, message in said) == (status, True), said
        assert told(*[good] * 5)[1].startswith("ip_adapters is 5; at most 4")
        assert ask(url, "/v1/models/style", method="GET")[2]["kind"] == "ip_adapter"
