"""Validation: images and metrics of each checkpoint, made beside training.

Owns what is generated, and the loop that validates each checkpoint once. The images come from the
engine, in a Ray task of their own.
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
from rayjobs.dreambooth.export import rebuild
from rayjobs.dreambooth.resolved import ResolvedRun
from rayjobs.dreambooth.results import Result
from rayjobs.dreambooth.training import worker
from rayjobs.dreambooth.training.checkpoints import Checkpoints

POLL_S = 2.0
MAX_ROWS = 8
GRID_SIDE = 256
"""Pixels of a picture in a grid, at most."""


class ValidationLoop:
    """A context in which every checkpoint that is due is validated, one at a time.

    At its end those still due are validated too, unless an error ended it.
    """

    def __init__(self, run: ResolvedRun):
        self.run = run
        self.failures: dict[int, str] = {}
        """Why a step could not be validated, by step."""
        self._checkpoints = Checkpoints(run.checkpoints_uri)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> "ValidationLoop":
        if self.run.config.validation.every_n_steps:
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self._stop.set()
        if self.run.config.validation.every_n_steps:
            self._thread.join()
            if kind is None:
                while (step := self._due()) is not None:
                    self._validate(step)

    def _follow(self) -> None:
        while not self._stop.wait(POLL_S):
            with contextlib.suppress(storage.StorageError):  # an unreachable server comes back
                step = self._due()
                if step is not None:
                    self._validate(step)

    def _due(self) -> int | None:
        """The next step to validate: step 0, before training, then every due checkpoint."""
        config = self.run.config
        every, last = config.validation.every_n_steps, config.train.steps
        done = {result.step for result in results.read(config.output.uri)}
        done |= self.failures.keys()
        steps = [checkpoint.step for checkpoint in self._checkpoints.list()]
        due = [0, *(step for step in steps if step % every == 0 or step == last)]
        return next((step for step in due if step not in done), None)

    def _validate(self, step: int) -> None:
        resources = self.run.config.validation
        task = ray.remote(validate).options(
            num_cpus=resources.num_cpus, num_gpus=resources.num_gpus
        )
        try:
            ray.get(task.remote(self.run, step))
        except ray.exceptions.RayError as error:
            self.failures[step] = str(error).strip().splitlines()[-1]


def validate(run: ResolvedRun, step: int) -> None:
    """Generate and measure images of the model as it is after a step, and store the result."""
    config = run.config
    torch.set_num_threads(max(1, int(config.validation.num_cpus)))
    model = _model(run, step)
    prompts = list(config.validation.prompts or (config.instance.prompt,))
    class_prompts = [config.prior.prompt] if config.prior.prompt else []
    images = generate(model, config, prompts, config.validation.num_images)
    class_images = generate(model, config, class_prompts, 2 * config.validation.num_images)
    grids = {}
    for number, (prompt, pictures) in enumerate((images | class_images).items()):
        name = f"step-{step:08d}-{number:02d}.jpg"
        storage.write_bytes(storage.join(results.folder(config.output.uri), name), grid(pictures))
        grids[prompt] = name
    values = measure(run, images, class_images, model.device)
    before = next((r.metrics for r in results.read(config.output.uri) if r.step == 0), None)
    score = metrics.joint_score(values, before or values) if values else None
    results.write(config.output.uri, Result(step, score, values, grids))


def generate(
    model: Model, config: DreamBoothConfig, prompts: list[str], num_images: int
) -> dict[str, metrics.Pictures]:
    """Images by prompt, with seeds 0, 1, ...; the same for every step of a run."""
    settings = config.validation
    side = config.train.resolution or model.default_side
    engine = Engine(model, max_rows=MAX_ROWS)
    images: dict[str, metrics.Pictures] = {}
    for prompt in prompts:
        requests = [
            Request(
                prompt=prompt,
                seed=seed,
                steps=settings.steps,
                guidance_scale=settings.guidance_scale,
                width=side,
                height=side,
            )
            for seed in range(num_images)
        ]
        done = sorted(engine.generate(requests), key=lambda result: result.request.seed)
        images[prompt] = [_image(result) for result in done]
    return images


def measure(
    run: ResolvedRun,
    images: dict[str, metrics.Pictures],
    class_images: dict[str, metrics.Pictures],
    device: str,
) -> dict[str, float]:
    """The metrics, where encoders are named."""
    subject, prompt = metrics.load_encoders(run.config.validation.encoders, device)
    if subject is None:
        return {}
    real = [photo.open() for photo in run.photos]
    return metrics.measure(subject, prompt, real, images, class_images)


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


def _model(run: ResolvedRun, step: int) -> Model:
    device = "cuda" if run.config.validation.num_gpus else "cpu"
    compute = worker.choose_precision(run.config.train.precision, device)
    if step == 0:
        return worker.load(run.config, device, compute)
    return rebuild(run, step, device, compute).model


def _image(result: Any) -> Image.Image:
    if result.image is None:
        raise RuntimeError(result.error)
    return result.image
