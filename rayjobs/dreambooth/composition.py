"""Where DreamBooth meets the generation job: class images before training, images to evaluate.

The only module of this package that knows `rayjobs.generation`. Owns how the settings of one job
become those of the other, and the order of a whole run: resolve, make class images, train.
"""

import io
import json
import sys
from dataclasses import dataclass

from PIL import Image

from rayjobs import cluster, storage
from rayjobs.config import BadInput
from rayjobs.dataset.lock import read_lock
from rayjobs.dataset.reader import Reader
from rayjobs.dreambooth import checks, job, lock
from rayjobs.dreambooth.config import DreamBoothConfig
from rayjobs.dreambooth.config.evaluate import EvaluateConfig, ModelConfig, read_prompts
from rayjobs.dreambooth.data.photos import (
    Photo,
    Subject,
    find_photos,
    look_for_photos,
    tell_skipped,
)
from rayjobs.dreambooth.report import page_uri
from rayjobs.dreambooth.resolved import ResolvedRun, resolve, warn
from rayjobs.generation import job as generation_job
from rayjobs.generation import prior as prior_job
from rayjobs.generation.config import GenerateConfig
from rayjobs.generation.prior import PriorConfig
from rayjobs.models.facts import find_weights
from rayjobs.models.options import SourceConfig
from rayjobs.room import await_room, check_machine, check_shared

METRICS = "metrics.json"
IMAGES_PER_SHARD = 16
ByPrompt = dict[str, list[Image.Image]]


def train(config: DreamBoothConfig) -> job.Summary:
    """A whole run, on the cluster there is or one of its own. A finished run is left as it is,
    but for outputs that it lacks.

    Raises BadInput, also when the folder holds a run of other settings, StorageError or JobFailed.
    """
    run = resolve(config)
    lock.compare(run.config.output.uri, lock.describe(run), without=("priors",))
    finished = job.is_finished(run)
    if finished and job.is_complete(run):
        return job.Summary(0, 0.0, run.export_uri, page_uri(run), was_finished=True)
    if cluster.is_own() and not finished:
        check_machine(run.config.workers)
    with cluster.session(job.num_cpus(run.config)):
        check_shared(run.config.output.uri)
        if not finished:
            await_room(run.config.workers, run.config.workers.min, cluster.is_owned())
        # A finished run's class images are not looked for: they may be gone.
        return job.run(run if finished else with_class_images(run))


def describe(config: DreamBoothConfig) -> str:
    """What a training would work with. Raises BadInput as `train` does before any work."""
    run = resolve(config)
    photos = sum(len(subject.photos) for subject in run.subjects)
    train, prior = config.train, config.prior
    images = 0 if prior.mode == "none" else prior.num_images * len(run.subjects)
    shown = train.steps * train.global_batch_size
    return (
        f"{photos:,} photographs, {images:,} class images; {train.method}, {train.steps:,} steps "
        f"of {train.global_batch_size:,}: each photograph {shown / photos:,.0f} times"
    )


def describe_evaluation(config: EvaluateConfig) -> str:
    """How many pictures an evaluation would make. Raises BadInput as it does before any work."""
    find_weights(config.model)
    prompts = len(read_prompts(config))
    whole = prompts * config.num_images + config.num_class_images
    twice = ""
    if config.before is not None:
        find_weights(config.before)
        whole, twice = 2 * whole, "; as many before training"
    return (
        f"{whole:,} pictures: {prompts:,} prompts x {config.num_images:,}, and "
        f"{config.num_class_images:,} of the class{twice}"
    )


def with_class_images(run: ResolvedRun) -> ResolvedRun:
    """The run with its class images: the user's own, or made by the prior job where missing.

    Raises BadInput when a folder of the user's own has too few, JobFailed when they cannot be made.
    """
    if run.config.prior.mode == "none":
        return run
    images: dict[str, list[Photo]] = {}
    for subject in run.subjects:
        if subject.class_uri not in images:
            images[subject.class_uri] = _class_images(run, subject)
    return run.with_class_images(images)


def _class_images(run: ResolvedRun, subject: Subject) -> list[Photo]:
    wanted, uri, prompt = run.config.prior.num_images, subject.class_uri, subject.class_prompt
    made = read_lock(uri)
    if made is None and subject.has_own_class and storage.list_files(uri):
        found = look_for_photos(uri, prompt)
        warn(tell_skipped(found.skipped))
        return _check_enough(uri, found.photos, wanted)
    if made is not None:
        _warn_of_other_model(run, uri, made.segments[0].model_sha256)
        if subject.has_own_class and Reader(uri).num_committed >= wanted:
            images = find_photos(uri, prompt)
            if len(images) >= wanted:
                return images
    prior_job.run(_prior_config(run, subject))
    return find_photos(uri, prompt)


def _prior_config(run: ResolvedRun, subject: Subject) -> PriorConfig:
    config, side = run.config, run.config.train.resolution
    return PriorConfig.model_validate(
        {
            "model": {
                **{name: getattr(config.model, name) for name in SourceConfig.model_fields},
                "device": config.model.device,
                "attention": config.model.attention,
            },
            "prompts": {"inline": [subject.class_prompt]},
            "num_images": config.prior.num_images,
            "job_seed": config.train.seed,
            "sampler": {
                "steps": config.prior.steps,
                "guidance_scale": config.prior.guidance_scale,
            },
            "image": {"width": side, "height": side},
            "output": {"uri": subject.class_uri, "images_per_shard": IMAGES_PER_SHARD},
            "workers": config.workers.shared,
        }
    )


def _check_enough(uri: str, images: list[Photo], wanted: int) -> list[Photo]:
    if len(images) < wanted:
        raise BadInput(
            f"prior.uri {uri} has {len(images)} pictures, but prior.num_images is "
            f"{wanted}; add some, or lower it, or leave prior.uri out to have them made"
        )
    return images


def _warn_of_other_model(run: ResolvedRun, uri: str, made_by_sha256: str) -> None:
    if made_by_sha256 != run.model_sha256:
        print(
            f"warning: the class images in {uri} were made by another model than "
            f"{run.config.model.uri}: they will pull it towards that one, and some licences "
            "(Playground v2.5's among them) forbid to improve other models with a model's pictures",
            file=sys.stderr,
        )


@dataclass(frozen=True)
class Evaluation:
    """What was measured, and of how many images."""

    metrics: dict[str, float]
    score: float
    num_pictures: int
    output_uri: str


def evaluate(config: EvaluateConfig) -> Evaluation:
    """Generate what is missing, measure, write metrics.json. Raises BadInput without encoders."""
    if config.encoders.subject is None:
        raise BadInput("encoders.subject is missing, such as facebook/dino-vits16")
    checks.check_encoders(config.encoders, "encoders")
    import torch

    from rayjobs.dreambooth import metrics

    prompts = read_prompts(config)
    photos = find_photos(config.subject.uri, "")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    subject, prompt = metrics.load_encoders(config.encoders, device)
    assert subject is not None
    real = [photo.open() for photo in photos]
    images, class_images = _make(config, config.model, config.output.uri, prompts)
    values = metrics.measure(subject, prompt, real, images, class_images)
    before = None
    if config.before is not None:
        uri = storage.join(config.output.uri, "before")
        made = _make(config, config.before, uri, prompts)
        before = metrics.measure(subject, prompt, real, *made)
    score = metrics.joint_score(values, before)
    data = json.dumps({**values, "joint_score": score}, indent=1)
    storage.write_bytes(storage.join(config.output.uri, METRICS), data.encode())
    return Evaluation(values, score, sum(map(len, images.values())), config.output.uri)


def _make(
    config: EvaluateConfig, model: ModelConfig, uri: str, prompts: list[str]
) -> tuple[ByPrompt, ByPrompt]:
    """Pictures of the subject and of its class, made where they are missing."""
    class_prompt = config.subject.class_prompt or f"a photo of a {config.subject.class_word}"
    of_subject, of_class = storage.join(uri, "pictures"), storage.join(uri, "class")
    images = _generate(config, model, prompts, config.num_images, of_subject)
    return images, _generate(config, model, [class_prompt], config.num_class_images, of_class)


def _generate(
    config: EvaluateConfig, model: ModelConfig, prompts: list[str], count: int, uri: str
) -> ByPrompt:
    """Images by prompt, made by the generation job in a folder of their own."""
    values = {
        "model": model.model_dump(),
        "prompts": {"inline": prompts},
        "seeds": {"count": count},
        "sampler": {"steps": config.steps, "guidance_scale": config.guidance_scale},
        "output": {"uri": uri, "images_per_shard": IMAGES_PER_SHARD},
        "workers": config.workers.shared,
    }
    generation_job.run(GenerateConfig.model_validate(values))
    images: dict[str, list[Image.Image]] = {}
    for row in Reader(uri).read(["prompt", "status", "image"]):
        if row["status"] == "ok":
            image = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
            images.setdefault(row["prompt"], []).append(image)
    return images
