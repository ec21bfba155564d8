"""Control pictures in a request's body: decoded, and every mistake told by its field."""

import base64
import random
from collections.abc import Callable
from typing import Any

from PIL import Image

from rayjobs.images.encode import encode_picture
from serve.protocol import ControlUse
from tests.serving.asking import EDIT, ask, form, png
from tests.serving.in_process import QuickEngines, serving

CONTROLS = [
    {"name": "edges", "uri": "nets/edges"},
    {"name": "depth", "uri": "nets/depth", "base": "starter"},
    {"name": "far", "uri": "nets/far", "base": "second"},
]
MODELS = [{"name": "starter", "uri": "starter"}, {"name": "second", "uri": "starter"}]


def test_control_pictures(picture: Callable[[int], Image.Image]) -> None:
    file = encode_picture(picture(1), "png", 95, None)
    text = base64.b64encode(file).decode()
    noise = Image.frombytes("RGB", (600, 600), random.Random(0).randbytes(3 * 600 * 600))
    large = base64.b64encode(encode_picture(noise, "png", 95, None))
    engines = QuickEngines()
    with serving(engines, models=MODELS, controls=CONTROLS) as url:

        def told(*controls: dict[str, Any], **more: Any) -> tuple[int, str]:
            status, _, body = ask(url, body={"prompt": "a star", "controls": controls, **more})
            return status, str(body.get("error", {}).get("message"))

        good = {"name": "edges", "image": text}
        in_url = {"name": "depth", "image": f"data:image/png;base64,{text}", "end": 0.5}
        assert told(good | {"scale": 2.0}, in_url)[0] == 200
        one, two = engines.asked[-1].controls
        assert isinstance(one, ControlUse)
        assert one.pixels.data == picture(1).tobytes()
        assert [(use.name, use.scale, use.end) for use in (one, two)] == [
            ("edges", 2.0, 1.0),
            ("depth", 1.0, 0.5),
        ]
        assert len(large) > 2**20
        assert told(good | {"image": large.decode()})[0] == 200
        for status, message, of_control, of_body in (
            (404, "The ControlNet 'starter' does not exist", {"name": "starter"}, {}),
            (400, "'far' is for another model, second", {"name": "far"}, {}),
            (400, "It is not base64", {"image": "!"}, {}),
            (400, "The controls is no PNG, JPEG or WebP", {"image": "aGVsbG8gd29ybGQ="}, {}),
            (400, "controls is 9; at most 4", {"scale": -9.0}, {}),
            (400, "a control goes from 0.9 to 0.5", {"start": 0.9, "end": 0.5}, {}),
            (400, "do not go together", {}, {"cache_interval": 2}),
            (400, "Unknown parameter: 'controls.0.strength'", {"strength": 1}, {}),
        ):
            given, said = told(good | of_control, **of_body)
            assert (given, message in said) == (status, True), said
        assert told(good | {"preprocess": "canny"})[0] == 200
        assert engines.asked[-1].controls[0].preprocess == "canny"
        assert told(good | {"preprocess": "depth"})[0] == 400
        sent = form(
            ("image", png()),
            ("control_image", file),
            ("prompt", "a star"),
            ("controls", '[{"name": "edges", "image": "a.png", "scale": 0.5}]'),
        )
        assert ask(url, EDIT, **sent)[0] == 200
        (one,) = engines.asked[-1].controls
        assert (one.pixels.data, one.scale) == (picture(1).tobytes(), 0.5)
        twice = form(("image", png()), ("control_image", file), ("control_image", file))
        assert "Two files of control_image are called 'a.png'" in str(ask(url, EDIT, **twice)[2])
        assert told(*[good] * 5)[1].startswith("controls is 5; at most 4")
        assert ask(url, "/v1/models/edges", method="GET")[2]["kind"] == "control"
        status, _, _ = ask(url, body={"prompt": "a star", "model": "edges"})
        assert status == 404
