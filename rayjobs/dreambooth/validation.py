"""Pictures and metrics of a checkpoint, made beside training.

Owns what is drawn, and the watch that has each checkpoint looked at once. The pictures come from
the engine, in a task of their own.
"""

import contextlib
import io
import threading
from typing import Any

import ray
import ray.exceptions
import torch
from PIL import Image

from rayjobs import storage
from rayjobs.diffusion.engine import Engine
from rayjobs.diffusion.model import Model
from rayjobs.diffusion.request import Request
from rayjobs.dreambooth import metrics, results
from rayjobs.dreambooth.config import DreamBoothConfig
from rayjobs.dreambooth.data.photos import find_photos
from rayjobs.dreambooth.export import rebuild
from rayjobs.dreambooth.results import Result
from rayjobs.dreambooth.training import worker
from rayjobs.dreambooth.training.checkpoints import Checkpoints

POLL_S = 2.0
MOST_ROWS = 8
GRID_SIDE = 256
"""Pixels of a picture in a grid, at most."""


class Watch:
    """A context in which every checkpoint that is due is validated, one at a time."""

    def __init__(self, config: DreamBoothConfig):
        self.config = config
        self.checkpoints = Checkpoints(storage.join(config.output.uri, "checkpoints"))
        self.failures: dict[int, str] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> "Watch":
        if self.config.validation.every_n_steps:
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self._stop.set()
        if self.config.validation.every_n_steps:
            self._thread.join()
            if kind is None:
                while (step := self._due()) is not None:
                    self._validate(step)

    def _follow(self) -> None:
        while not self._stop.wait(POLL_S):
            with contextlib.suppress(storage.StorageError):  # a server that is away comes back
                step = self._due()
                if step is not None:
                    self._validate(step)

    def _due(self) -> int | None:
        """The next step to look at: before training, then every due checkpoint."""
        every = self.config.validation.every_n_steps
        last = self.config.train.steps
        done = {result.step for result in results.read(self.config.output.uri)}
        done |= self.failures.keys()
        there = [c.step for c in self.checkpoints.list() if c.step % every == 0 or c.step == last]
        return next((step for step in [0, *there] if step not in done), None)

    def _validate(self, step: int) -> None:
        asked = self.config.validation
        task = ray.remote(validate).options(num_cpus=asked.num_cpus, num_gpus=asked.num_gpus)
        try:
            ray.get(task.remote(self.config, step))
        except ray.exceptions.RayError as error:
            self.failures[step] = str(error).strip().splitlines()[-1]


def validate(config: DreamBoothConfig, step: int) -> None:
    """Draw and measure the model as it is after a step, and store what was found."""
    torch.set_num_threads(max(1, int(config.validation.num_cpus)))
    model = _model(config, step)
    prompts = list(config.validation.prompts or (config.instance.prompt,))
    class_prompts = [config.prior.prompt] if config.prior.prompt else []
    made = draw(model, config, prompts)
    of_class = draw(model, config, class_prompts, per_prompt=2 * config.validation.num_images)
    grids = {}
    for number, (prompt, pictures) in enumerate((made | of_class).items()):
        name = f"step-{step:08d}-{number:02d}.jpg"
        storage.write_bytes(storage.join(results.folder(config.output.uri), name), grid(pictures))
        grids[prompt] = name
    found = measure(config, made, of_class, model.device)
    before = next((r.metrics for r in results.read(config.output.uri) if r.step == 0), None)
    score = metrics.joint_score(found, before or found) if found else None
    results.write(config.output.uri, Result(step, score, found, grids))


def draw(
    model: Model, config: DreamBoothConfig, prompts: list[str], per_prompt: int | None = None
) -> dict[str, metrics.Pictures]:
    """Pictures by prompt, with seeds 0, 1, ...; the same for every step of a run."""
    asked = config.validation
    side = config.train.resolution or model.default_side
    engine = Engine(model, max_rows=MOST_ROWS)
    made: dict[str, metrics.Pictures] = {}
    for prompt in prompts:
        requests = [
            Request(
                prompt=prompt,
                seed=seed,
                steps=asked.steps,
                guidance_scale=asked.guidance_scale,
                width=side,
                height=side,
            )
            for seed in range(per_prompt or asked.num_images)
        ]
        done = sorted(engine.generate(requests), key=lambda result: result.request.seed)
        made[prompt] = [_picture(result) for result in done]
    return made


def measure(
    config: DreamBoothConfig,
    made: dict[str, metrics.Pictures],
    of_class: dict[str, metrics.Pictures],
    device: str,
) -> dict[str, float]:
    """The metrics, where encoders are named."""
    subject, prompt = metrics.load_encoders(config.validation.encoders, device)
    if subject is None:
        return {}
    photos = find_photos(config.instance.uri, config.instance.prompt)
    return metrics.measure(subject, prompt, [p.open() for p in photos], made, of_class)


def grid(pictures: metrics.Pictures) -> bytes:
    """A JPEG with the pictures side by side."""
    side = min(GRID_SIDE, pictures[0].width)
    height = round(side * pictures[0].height / pictures[0].width)
    sheet = Image.new("RGB", (side * len(pictures), height))
    for number, picture in enumerate(pictures):
        sheet.paste(picture.resize((side, height), Image.Resampling.LANCZOS), (number * side, 0))
    buffer = io.BytesIO()
    sheet.save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def _model(config: DreamBoothConfig, step: int) -> Model:
    device = "cuda" if config.validation.num_gpus else "cpu"
    compute = worker.choose_precision(config.train.precision, device)
    if step == 0:
        return worker.load(config, device, compute)
    checkpoints = Checkpoints(storage.join(config.output.uri, "checkpoints"))
    (checkpoint,) = [each for each in checkpoints.list() if each.step == step]
    return rebuild(config, checkpoints, checkpoint, device, compute).model


def _picture(result: Any) -> Image.Image:
    if result.image is None:
        raise RuntimeError(result.error)
    return result.image
