"""Load for the serving benchmark: requests, arrival times, and a client that records answers.

Knows a side by its URL alone, so that all get the same requests.
"""

import asyncio
import base64
import io
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import numpy as np
from PIL import Image

from rayjobs.starter import world

MIX: dict[str, dict[Any, float]] = {
    "steps": {4: 0.15, 8: 0.15, 20: 0.25, 30: 0.3, 50: 0.15},
    "guidance": {1.0: 0.2, 3.5: 0.2, 5.0: 0.3, 7.5: 0.3},
    "sampler": {"euler": 0.4, "dpmpp_2m": 0.3, "ddim": 0.15, "euler_a": 0.15},
    "edit": {False: 0.7, True: 0.3},
    "size": {0: 0.7, 1: 0.15, 2: 0.15},
}
"""Drawn one by one. Sizes are the model's, its default first."""
DEFAULT_SHARE = 0.4
"""Share of callers with default settings: only these fill batches of one key."""
DEFAULTS = {"steps": 30, "guidance": 5.0, "sampler": "euler", "edit": False, "size": 0}
STRENGTH = 0.6
BURST = 6
STREAMED_EVERY = 4
"""Every so many requests are streams with a partial image, where the side has such."""
MAX_WAIT_S = 900.0


@dataclass(frozen=True)
class Wanted:
    """One request. With `image` (a PNG) it is image-to-image."""

    number: int
    values: dict[str, Any]
    image: bytes | None


@dataclass
class Answer:
    """What a caller saw; seconds count from the time at which the request should be sent."""

    number: int
    status: int
    seconds: float
    end_s: float
    """From the first arrival."""
    first_s: float | None = None
    """Until the first image, partial or whole."""
    image: bytes = b""
    retry_after_s: float | None = None


def draw_requests(number: int, sizes: Sequence[tuple[int, int]], seed: int = 0) -> list[Wanted]:
    """The same requests each time: prompts of the starter model's world, settings of the mix."""
    rng, pictures = random.Random(seed), np.random.default_rng(seed)
    wanted = []
    for place in range(number):
        if rng.random() < DEFAULT_SHARE:
            drawn: dict[str, Any] = DEFAULTS
        else:
            drawn = {name: rng.choices(*zip(*w.items(), strict=True))[0] for name, w in MIX.items()}
        width, height = sizes[drawn["size"]]
        scene = world.random_scene(pictures)
        values = {
            "prompt": world.caption(scene),
            "seed": rng.randrange(2**32),
            "size": f"{width}x{height}",
            "num_inference_steps": drawn["steps"],
            "guidance_scale": drawn["guidance"],
            "sampler": drawn["sampler"],
        }
        image = None
        if drawn["edit"]:
            values["strength"] = STRENGTH
            canvas = Image.fromarray(world.draw(scene, pictures, max(width, height)))
            canvas.crop((0, 0, width, height)).save(file := io.BytesIO(), "PNG")
            image = file.getvalue()
        wanted.append(Wanted(place, values, image))
    return wanted


def arrivals(kind: str, number: int, rate: float, seed: int = 0) -> list[float]:
    """Seconds from the first arrival: one by one, or in bursts, as many on average."""
    rng, size = random.Random(seed), BURST if kind == "bursty" else 1
    moments, now_s = [], 0.0
    while len(moments) < number:
        moments += [now_s] * size
        now_s += rng.expovariate(rate / size)
    return moments[:number]


def play(
    url: str, wanted: Sequence[Wanted], moments: Sequence[float], streams: bool
) -> list[Answer]:
    """Every request at its moment, whatever has become of the others."""

    async def run() -> list[Answer]:
        async with _session() as session:
            start_s = time.monotonic()

            async def at(one: Wanted, moment: float) -> Answer:
                await asyncio.sleep(start_s + moment - time.monotonic())
                stream = streams and one.number % STREAMED_EVERY == 0
                return await _ask(session, url, one, (start_s, start_s + moment), stream)

            return await asyncio.gather(*map(at, wanted, moments))

    return asyncio.run(run())


def play_closed(url: str, wanted: Sequence[Wanted], clients: int) -> list[Answer]:
    """Every request once, by so many clients, each of which waits for its answer."""

    async def run() -> list[Answer]:
        left, answers = iter(wanted), list[Answer]()
        async with _session() as session:
            start_s = time.monotonic()

            async def client(left: Iterator[Wanted]) -> None:
                for one in left:
                    moments = (start_s, time.monotonic())
                    answers.append(await _ask(session, url, one, moments, False))

            await asyncio.gather(*(client(left) for _ in range(clients)))
        return sorted(answers, key=lambda answer: answer.number)

    return asyncio.run(run())


def _session() -> aiohttp.ClientSession:
    timeout = aiohttp.ClientTimeout(total=MAX_WAIT_S)
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout)


async def _ask(
    session: aiohttp.ClientSession,
    url: str,
    one: Wanted,
    moments: tuple[float, float],
    stream: bool,
) -> Answer:
    """One request; `moments` are the run's start and when this was to be sent."""
    start_s, due_s = moments
    values = one.values | ({"stream": True, "partial_images": 1} if stream else {})
    answer = Answer(one.number, 0, 0.0, 0.0)
    if one.image is None:
        sent = session.post(f"{url}/v1/images/generations", json=values)
    else:
        form = aiohttp.FormData()
        for name, value in values.items():
            form.add_field(name, value if isinstance(value, str) else json.dumps(value))
        form.add_field("image", one.image, filename="image.png", content_type="image/png")
        sent = session.post(f"{url}/v1/images/edits", data=form)
    async with sent as response:
        answer.status = response.status
        if "retry-after-ms" in response.headers:
            answer.retry_after_s = float(response.headers["retry-after-ms"]) / 1000
        if stream and response.status == 200:
            await _watch(response, answer, due_s)
        else:
            data = await response.read()
            if response.status == 200:
                answer.image = base64.b64decode(json.loads(data)["data"][0]["b64_json"])
    now_s = time.monotonic()
    answer.seconds, answer.end_s = now_s - due_s, now_s - start_s
    if answer.first_s is None and answer.image:
        answer.first_s = answer.seconds
    return answer


async def _watch(response: aiohttp.ClientResponse, answer: Answer, due_s: float) -> None:
    """Read server-sent events to their end; one that tells of a failure leaves no image."""
    buffer = b""
    async for chunk in response.content.iter_any():
        buffer += chunk
        *events, buffer = buffer.split(b"\n\n")
        for event in events:
            data = json.loads(event.split(b"data: ", 1)[1])
            if data.get("type", "").endswith(".partial_image") and answer.first_s is None:
                answer.first_s = time.monotonic() - due_s
            elif data.get("type", "").endswith(".completed"):
                answer.image = base64.b64decode(data["b64_json"])
