"""What the serving benchmark compares with: diffusers' own pipelines as Ray Serve deployments.

Owns three ways to wrap one pair of pipelines, each behind an ingress that takes our routes, fields
and answers. They follow Ray's own example (doc/source/serve/doc_code/stable_diffusion.py): a
FastAPI ingress that awaits a handle and encodes what comes back, and one replica that holds the
pipeline. Where they are better than it, it is in their favour: the pipelines run beside the event
loop, no request is refused, nothing is checked, and a PNG is encoded as quickly as ours.
"""

import asyncio
import base64
import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from fastapi import FastAPI, Request
from PIL import Image
from ray import serve as ray_serve
from ray.serve import Application

from rayjobs.diffusion.modules import onednn
from rayjobs.diffusion.sampler import resolve
from rayjobs.diffusion.weights import locate
from serve.images import encode, to_pixels

MAX_ONGOING_REQUESTS = 4096
"""Requests in a replica: Ray's 5 would leave a batch of 8 unfilled, and make a queue of retries."""
BATCH_WAIT_S = 0.05


@dataclass(frozen=True)
class Setup:
    """What every side is given alike: weights, threads, and how many requests share a call."""

    uri: str
    threads: int
    rows: int
    lent: bool
    """Whether rivals get what is not theirs: our Linear kernels and layout of memory."""
    pending_s: float = 900.0
    """Work that may wait at ours; the others refuse nobody."""


@dataclass(frozen=True)
class Wish:
    """One picture to make."""

    prompt: str
    seed: int
    steps: int
    guidance: float
    sampler: str
    size: tuple[int, int]
    image: Image.Image | None = None
    strength: float = 1.0

    @property
    def key(self) -> tuple[Any, ...]:
        """Wishes that agree in this can share a call of the pipeline."""
        task = self.image is not None, self.strength
        return *task, self.size, self.steps, self.guidance, self.sampler


class Pipelines:
    """Text-to-image and image-to-image on the same weights, in float32 on the CPU."""

    def __init__(self, setup: Setup):
        torch.set_num_threads(setup.threads)
        self.text: Any = StableDiffusionXLPipeline.from_pretrained(
            locate(setup.uri).path, dtype=torch.float32, use_safetensors=True, add_watermarker=False
        )
        if setup.lent:
            for part in (self.text.unet, self.text.vae):
                part.to(memory_format=torch.channels_last)
            for part in (self.text.unet, self.text.text_encoder, self.text.text_encoder_2):
                onednn.use_for_linear(part)
        self.image: Any = StableDiffusionXLImg2ImgPipeline.from_pipe(
            self.text, add_watermarker=False
        )
        self.own = self.text.scheduler.config
        for pipeline in (self.text, self.image):
            pipeline.set_progress_bar_config(disable=True)

    def __call__(self, wishes: list[Wish]) -> list[Image.Image]:
        """Pictures of wishes of one key, in one call."""
        one = wishes[0]
        pipeline = self.text if one.image is None else self.image
        sampler_class, options = resolve(one.sampler, {})
        pipeline.scheduler = sampler_class.from_config(self.own, **options)
        width, height = one.size
        more: dict[str, Any] = {"width": width, "height": height}
        if one.image is not None:
            more = {"image": [wish.image for wish in wishes], "strength": one.strength}
        pictures: list[Image.Image] = pipeline(
            [wish.prompt for wish in wishes],
            num_inference_steps=one.steps,
            guidance_scale=one.guidance,
            generator=[torch.Generator("cpu").manual_seed(wish.seed) for wish in wishes],
            **more,
        ).images
        return pictures


# Ways to wrap them


class OneAtATime:
    """Ray's example. There one request at a time is what a synchronous method used to mean; Ray
    2.60 runs such methods in several threads, which one pipeline does not stand, so here is a lock.
    """

    def __init__(self, setup: Setup):
        self.pipelines = Pipelines(setup)
        self.turn = asyncio.Lock()

    async def generate(self, wish: Wish) -> Image.Image:
        async with self.turn:
            return (await asyncio.to_thread(self.pipelines, [wish]))[0]


class Batched:
    """`@serve.batch`: what has come together is made group by group and answered together."""

    def __init__(self, setup: Setup):
        self.pipelines = Pipelines(setup)
        generate: Any = self.generate
        generate.set_max_batch_size(setup.rows)

    @ray_serve.batch(max_batch_size=8, batch_wait_timeout_s=BATCH_WAIT_S)
    async def generate(self, wishes: list[Wish]) -> list[Image.Image]:
        groups: dict[tuple[Any, ...], list[int]] = {}
        for number, wish in enumerate(wishes):
            groups.setdefault(wish.key, []).append(number)
        made: dict[int, Image.Image] = {}
        for numbers in groups.values():
            group = [wishes[number] for number in numbers]
            made |= zip(numbers, await asyncio.to_thread(self.pipelines, group), strict=True)
        return [made[number] for number in range(len(wishes))]


class Keyed:
    """A `@serve.batch` queue for each key, the keys by turns: nobody waits for another's group."""

    def __init__(self, setup: Setup):
        self.setup = setup
        self.pipelines = Pipelines(setup)
        self.turn = asyncio.Lock()
        self.queues: dict[tuple[Any, ...], Callable[[Wish], Any]] = {}

    async def generate(self, wish: Wish) -> Image.Image:
        if wish.key not in self.queues:
            self.queues[wish.key] = self._queue()
        picture: Image.Image = await self.queues[wish.key](wish)
        return picture

    def _queue(self) -> Any:
        @ray_serve.batch(max_batch_size=self.setup.rows, batch_wait_timeout_s=BATCH_WAIT_S)
        async def group(wishes: list[Wish]) -> list[Image.Image]:
            async with self.turn:
                return await asyncio.to_thread(self.pipelines, wishes)

        return group


KINDS: dict[str, type] = {"a": OneAtATime, "b": Batched, "keyed": Keyed}

app = FastAPI()


@ray_serve.deployment(
    max_ongoing_requests=MAX_ONGOING_REQUESTS, ray_actor_options={"num_cpus": 0.1}
)
@ray_serve.ingress(app)
class Ingress:
    """Our two routes, as far as the benchmark's requests go."""

    def __init__(self, pipeline: Any):
        self.handle = pipeline

    @app.post("/v1/images/generations")
    async def generations(self, request: Request) -> dict[str, Any]:
        return await self._answer(await request.json(), None)

    @app.post("/v1/images/edits")
    async def edits(self, request: Request) -> dict[str, Any]:
        async with request.form() as form:
            upload: Any = form["image"]
            image = Image.open(io.BytesIO(await upload.read())).convert("RGB")
            values = {name: value for name, value in form.items() if name != "image"}
        return await self._answer(values, image)

    async def _answer(self, values: dict[str, Any], image: Image.Image | None) -> dict[str, Any]:
        width, height = map(int, values["size"].split("x"))
        wish = Wish(
            prompt=values["prompt"],
            seed=int(values["seed"]),
            steps=int(values["num_inference_steps"]),
            guidance=float(values["guidance_scale"]),
            sampler=values["sampler"],
            size=(width, height),
            image=image,
            strength=float(values.get("strength", 1.0)),
        )
        picture = await self.handle.generate.remote(wish)
        data = base64.b64encode(encode(to_pixels(picture), "png", 100)).decode()
        return {"created": int(time.time()), "data": [{"b64_json": data}]}


def build(kind: str, setup: Setup) -> Application:
    """One replica of that kind behind an ingress."""
    deployment: Any = ray_serve.deployment(KINDS[kind])
    replica = deployment.options(
        name="Pipeline",
        num_replicas=1,
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        ray_actor_options={"num_cpus": setup.threads},
    )
    return Ingress.bind(replica.bind(setup))
