"""Many callers at once, as plain HTTP: what each was answered, and callers who leave."""

import asyncio
import base64
import io
import json
import random
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import numpy as np
from PIL import Image

PATH = "/v1/images/generations"


@dataclass
class Answer:
    status: int
    body: dict[str, Any]
    headers: dict[str, str]
    seconds: float
    asked: dict[str, Any]

    def pictures(self) -> list[np.ndarray]:
        found = [base64.b64decode(each["b64_json"]) for each in self.body["data"]]
        return [np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), int) for data in found]


def ask_all(
    url: str,
    bodies: list[dict[str, Any]],
    gap_s: float = 0.0,
    meanwhile: Callable[[], None] | None = None,
) -> list[Answer]:
    """Send every body, `gap_s` apart, each without waiting for the others."""

    async def main() -> list[Answer]:
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=1800)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            tasks = []
            for body in bodies:
                tasks.append(asyncio.create_task(_ask(session, url, body)))
                await asyncio.sleep(gap_s)
            if meanwhile is not None:
                await asyncio.to_thread(meanwhile)
            return await asyncio.gather(*tasks)

    return asyncio.run(main())


async def _ask(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> Answer:
    started_s = time.monotonic()
    if "image" in body:
        form = aiohttp.FormData()
        for name, value in body.items():
            if isinstance(value, bytes):
                form.add_field(name, value, filename=f"{name}.png", content_type="image/png")
            else:
                form.add_field(name, str(value))
        sent = session.post(f"{url}/v1/images/edits", data=form)
    else:
        sent = session.post(url + PATH, json=body)
    async with sent as response:
        text = await response.text()
        found = json.loads(text)
        seconds = time.monotonic() - started_s
        return Answer(response.status, found, dict(response.headers), seconds, body)


def mixed(count: int, seed: int = 0, picture: bytes | None = None) -> list[dict[str, Any]]:
    """Requests no two of which are alike: steps, guidance, samplers, sizes, images of a call."""
    rng = random.Random(seed)
    samplers = ["euler", "ddim", "dpmpp_2m", "heun", "unipc", "euler_a"]
    found = []
    for number in range(count):
        body: dict[str, Any] = {
            "prompt": f"a photo of a {rng.choice(['red', 'green', 'blue'])} star, {number}",
            "seed": number,
            "num_inference_steps": rng.randint(4, 50),
            "guidance_scale": rng.choice([1.0, 3.5, 5.0, 7.5, 12.0]),
            "sampler": rng.choice(samplers),
            "size": rng.choice(["64x64", "96x64", "64x96"]),
            "n": rng.choice([1, 1, 1, 2, 4]),
        }
        if picture is not None and number % 3 == 0:
            body |= {"image": picture, "strength": rng.choice([0.4, 0.7, 1.0])}
        found.append(body)
    return found


def leave(url: str, body: dict[str, Any], after_s: float) -> None:
    """ImagesRequest, and go away without a word."""
    place, path = urlsplit(url), PATH
    data, kind = json.dumps(body, default=str).encode(), "application/json"
    if "image" in body:
        path, kind = "/v1/images/edits", "multipart/form-data; boundary=x"
        data = b"".join(_part(name, value) for name, value in body.items()) + b"--x--\r\n"
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Type: {kind}\r\n"
        f"Content-Length: {len(data)}\r\n\r\n"
    )
    with socket.create_connection((str(place.hostname), int(place.port or 80))) as connection:
        connection.sendall(head.encode() + data)
        time.sleep(after_s)


def _part(name: str, value: Any) -> bytes:
    is_file = isinstance(value, bytes)
    file = '; filename="a.png"' if is_file else ""
    head = f'--x\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'
    return head.encode() + (value if is_file else str(value).encode()) + b"\r\n"
