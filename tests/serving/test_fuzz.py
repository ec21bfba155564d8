"""Strangers: requests that the schema allows and ones it does not, pictures that are weapons."""

import contextlib
import io
import json
import random
import struct
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from PIL import Image
from schemathesis.generation import GenerationMode

from tests.serving.calls import ask_all
from tests.serving.running import Running, metrics, running
from tests.serving.test_faults import replicas

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
LIMITS = {"max_steps": 4, "max_pixels": 96 * 96, "max_side": 128, "max_upload_pixels": 4_000_000}
EXAMPLES = 60
GROWTH = 400 * 2**20


@pytest.fixture(scope="module")
def small() -> Iterator[Running]:
    """An application whose every answer is quick."""
    keys = {"models": [{"name": "starter", "uri": "starter"}], "limits": LIMITS}
    with running(keys) as found:
        yield found


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_no_request_is_a_server_error(small: Running, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_url(f"{small.url}/openapi.json")
    seen: set[int] = set()
    for found in schema.get_all_operations():
        operation = found.ok()

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        def one(case: Any) -> None:
            response = case.call(base_url=small.url, timeout=60)
            seen.add(response.status_code)
            if response.status_code == 504:  # they asked for it sooner than this machine makes it
                assert response.json()["error"]["param"] == "deadline_s", response.text
                return
            assert response.status_code < 500, response.text
            if response.status_code >= 400:
                assert set(response.json()["error"]) == {"message", "type", "param", "code"}

        with contextlib.suppress(Unsatisfiable):  # nothing can be wrong where nothing is asked for
            one()
    assert seen & {400, 404, 405, 415}
    assert metrics(small.url)["rows"] == 0


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *more: bytes) -> bytes:
    """A PNG that says it is so large, of almost no bytes."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(b"\0" * (1 + 3 * min(width, 4096)) * min(height, 4096), 9)
    body = chunk(b"IHDR", header) + b"".join(more) + chunk(b"IDAT", rows)
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


def picture(kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, kind, **options)
    return buffer.getvalue()


WEAPONS = {
    "bomb": png(60_000, 60_000),
    "large": png(4096, 4096),
    "text bomb": png(64, 64, chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x" * 2**26, 9))),
    "profile bomb": png(64, 64, chunk(b"iCCP", b"a\0\0" + zlib.compress(b"x" * 2**26, 9))),
    "huge exif": picture("JPEG", exif=b"Exif\0\0" + b"x" * 65_000),
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"></svg>',
    "html": b"<!doctype html><script>alert(1)</script>",
    "polyglot": picture("PNG") + b"PK\3\4" + b"\0" * 1000,
    "gif": picture("GIF"),
    "tiff": picture("TIFF"),
    "icon": picture("ICO", sizes=[(64, 64)]),
    "cut": picture("PNG")[:60],
    "cut jpeg": picture("JPEG")[:-200],
    "empty": b"",
    "noise": random.Random(0).randbytes(5000),
    "json": json.dumps({"image": "x"}).encode(),
}


def test_pictures_that_are_weapons(small: Running) -> None:
    workers = replicas(small) + ingresses(small)
    before = sum(process.memory_info().rss for process in workers)
    bodies = [{"image": data, "prompt": name} for name, data in WEAPONS.items()]
    bodies += [
        {"image": picture("PNG"), "mask": data, "prompt": name} for name, data in WEAPONS.items()
    ]
    answers = ask_all(small.url, bodies)
    for answer in answers:
        name = answer.asked["prompt"]
        harmless = name in ("text bomb", "polyglot", "huge exif")
        assert answer.status in ((200, 400) if harmless else (400,)), (name, answer.body)
        if answer.status == 400:
            assert answer.body["error"]["param"] in ("image", "mask"), (name, answer.body)
    assert all(process.is_running() for process in workers)
    after = sum(process.memory_info().rss for process in workers)
    assert after - before < GROWTH
    (good,) = ask_all(small.url, [{"image": picture("PNG"), "prompt": "a star"}])
    assert good.status == 200


def ingresses(app: Running) -> list[psutil.Process]:
    return replicas(app, "Ingress")


ODD_BODIES = [
    b"",
    b"null",
    b"[]",
    b'"text"',
    b"{",
    b"[" * 100_000,
    b'{"prompt": "a", "prompt": "b"',
    b'{"prompt": "\\ud800"}',
    b'{"prompt": NaN}',
    b'{"prompt": "a", "seed": 1e400}',
    b'{"prompt": "a", "seed": 99999999999999999999999999}',
    b'{"prompt": "a", "n": true, "size": {}}',
    b'{"prompt": "a", "loras": {"name": 1}}',
    b"\xff\xfe\x00",
    json.dumps({"prompt": "a" * 2_000_000}).encode(),
]


@pytest.mark.parametrize("body", ODD_BODIES, ids=range(len(ODD_BODIES)))
@pytest.mark.parametrize("path", ["generations", "edits"])
def test_bodies_that_are_none(small: Running, body: bytes, path: str) -> None:
    for kind in ("application/json", "multipart/form-data; boundary=x", "multipart/form-data", "x"):
        request = urllib.request.Request(
            f"{small.url}/v1/images/{path}", body, {"Content-Type": kind}, method="POST"
        )
        with pytest.raises(urllib.error.HTTPError) as told:
            urllib.request.urlopen(request, timeout=60)
        with told.value as answer:
            assert 400 <= answer.code < 500, (kind, answer.code)
            assert set(json.loads(answer.read())["error"]) == {"message", "type", "param", "code"}
