"""Images and metrics of one checkpoint: made by the engine, measured, and stored.

Owns what is generated for a validation. Knows no Ray and not when it is due.
"""

import io
from typing import Any

import torch
from PIL import Image

from rayjobs import storage
from rayjobs.diffusion.engine import Engine
from rayjobs.diffusion.model import Model
from rayjobs.diffusion.request import Request
from rayjobs.dreambooth import metrics, results
from rayjobs.dreambooth.config import DreamBoothConfig
from rayjobs.dreambooth.config.identifier import identifier_in
from rayjobs.dreambooth.export import rebuild
from rayjobs.dreambooth.resolved import ResolvedRun
from rayjobs.dreambooth.results import Result
from rayjobs.dreambooth.training import worker

MAX_ROWS = 8
GRID_SIDE = 512
"""Pixels of a picture in a grid, at most."""


def validate(run: ResolvedRun, step: int) -> None:
    """Generate and measure images of the model as it is after a step, and store the result."""
    config = run.config
    torch.set_num_threads(max(1, int(config.validation.num_cpus)))
    model = _model(run, step, "cuda" if config.validation.num_gpus else "cpu")
    subjects = run.subjects
    prompts = list(config.validation.prompts or [subject.prompt for subject in subjects])
    class_prompts = [subject.class_prompt for subject in subjects if subject.class_prompt]
    class_prompts = list(dict.fromkeys(class_prompts))
    images = generate(model, config, prompts, config.validation.num_images)
    class_images = generate(model, config, class_prompts, config.validation.num_class_images)
    grids = {}
    for number, (prompt, pictures) in enumerate((images | class_images).items()):
        name = f"step-{step:08d}-{number:02d}.jpg"
        storage.write_bytes(storage.join(results.folder(config.output.uri), name), grid(pictures))
        grids[prompt] = name
    values = measure(run, images, class_images, model.device)
    before = next((r.metrics for r in results.read(config.output.uri) if r.step == 0), None)
    score = metrics.joint_score(values, before or values) if values else None
    results.write(config.output.uri, Result(step, score, values, grids))


def draw(run: ResolvedRun, step: int) -> None:
    """Generate a few images of what is exported, for the page of a run without validation."""
    config, has_gpu = run.config, run.config.workers.num_gpus > 0
    model = _model(run, step, "cuda" if has_gpu else "cpu")
    count = config.validation.num_images if has_gpu else 1
    (pictures,) = generate(model, config, [config.instance.prompt], count).values()
    place = storage.join(results.folder(config.output.uri), results.EXPORTED)
    storage.write_bytes(place, grid(pictures))


def generate(
    model: Model, config: DreamBoothConfig, prompts: list[str], num_images: int
) -> dict[str, metrics.Pictures]:
    """Images by prompt, with seeds 0, 1, ...; the same for every step of a run."""
    settings = config.validation
    side = config.train.resolution or model.default_side
    engine = Engine(model, max_rows=min(MAX_ROWS, num_images))
    images: dict[str, metrics.Pictures] = {}
    for prompt in prompts:
        syntax = settings.prompt_syntax if prompt in settings.prompts else "plain"
        requests = [
            Request(
                prompt=prompt,
                prompt_syntax=syntax,
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
    """The metrics, where encoders are named; of several subjects, the means.

    A subject's pictures are those whose prompts have its identifier.
    """
    subject, prompt = metrics.load_encoders(run.config.validation.encoders, device)
    if subject is None:
        return {}
    measured = []
    for each in run.subjects:
        words = identifier_in(each.prompt, each.class_prompt).split() if run.more else []
        made = {text: some for text, some in images.items() if set(words) <= set(text.split())}
        of_class = {text: some for text, some in class_images.items() if text == each.class_prompt}
        if made:
            real = [photo.open() for photo in each.photos]
            measured.append(metrics.measure(subject, prompt, real, made, of_class))
    return metrics.mean(measured)


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


def _model(run: ResolvedRun, step: int, device: str) -> Model:
    precision = run.config.train.precision
    # What trains in half precision may be looked at on a CPU.
    precision = "fp32" if precision == "fp16" and device == "cpu" else precision
    compute = worker.choose_precision(precision, device)
    if step == 0:
        return worker.load(run.config, device, compute)
    return rebuild(run, step, device, compute).model


def _image(result: Any) -> Image.Image:
    if result.image is None:
        raise RuntimeError(result.error)
    return result.image
