"""Evaluation of a tuned model: pictures by the generation job, numbers by DreamBooth's metrics.

With `priors` the one place that knows both jobs. Owns the settings of one as the other's.
"""

import json
from dataclasses import dataclass

import torch
from PIL import Image

from rayjobs import storage
from rayjobs.config import BadInput
from rayjobs.dreambooth import metrics
from rayjobs.dreambooth.data.photos import find_photos
from rayjobs.dreambooth.evaluate_config import EvaluateConfig, read_prompts
from rayjobs.generation import job
from rayjobs.generation.config import GenerateConfig

FILE = "metrics.json"


@dataclass(frozen=True)
class Summary:
    """What was measured, and of how many pictures."""

    metrics: dict[str, float]
    score: float
    num_pictures: int
    output_uri: str


def run(config: EvaluateConfig) -> Summary:
    """Draw what is missing, measure, and write metrics.json. Raises BadInput without encoders."""
    if config.encoders.subject is None:
        raise BadInput("encoders.subject is missing, such as facebook/dino-vits16")
    prompts, subject = read_prompts(config), config.subject
    photos = find_photos(subject.uri, "")
    class_prompt = f"a photo of a {subject.class_word}"
    made = _draw(config, prompts, config.num_images, "pictures")
    of_class = _draw(config, [class_prompt], config.num_class_images, "class")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder, fit = metrics.load_encoders(config.encoders, device)
    assert encoder is not None
    real = [photo.open() for photo in photos]
    found = metrics.measure(encoder, fit, real, made, of_class)
    score = metrics.joint_score(found)
    uri = storage.join(config.output.uri, FILE)
    data = json.dumps({**found, "joint_score": score}, indent=1)
    storage.write_bytes(uri, data.encode())
    return Summary(found, score, sum(map(len, made.values())), config.output.uri)


def _draw(
    config: EvaluateConfig, prompts: list[str], count: int, name: str
) -> dict[str, list[Image.Image]]:
    """Pictures by prompt, made by the generation job in a folder of their own."""
    uri = storage.join(config.output.uri, name)
    values = {
        "model": config.model.model_dump(),
        "prompts": {"inline": prompts},
        "seeds": {"count": count},
        "sampler": {"steps": config.steps, "guidance_scale": config.guidance_scale},
        "output": {"uri": uri, "images_per_shard": 16},
        "workers": config.workers.shared,
    }
    job.run(GenerateConfig.model_validate(values))
    found: dict[str, list[Image.Image]] = {}
    for photo in find_photos(uri, ""):
        found.setdefault(photo.captions[0], []).append(photo.open())
    return found
