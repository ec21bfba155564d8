"""A DreamBooth run: check, train on Ray Train's workers, export.

Owns the order of things and how workers are asked for. A run has no memory but its folder:
run.lock.json, checkpoints/ and export/.
"""

import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
from ray.train.torch import TorchTrainer
from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.exceptions import TrainingFailedError
from transformers import AutoTokenizer

from rayjobs import cluster, storage
from rayjobs.config import BadInput, JobFailed
from rayjobs.diffusion.weights import Weights
from rayjobs.dreambooth import export, lock, report, results
from rayjobs.dreambooth.config import DreamBoothConfig, WorkersConfig
from rayjobs.dreambooth.data.photos import check_sizes, find_photos
from rayjobs.dreambooth.results import Result
from rayjobs.dreambooth.training import trackers, worker
from rayjobs.dreambooth.training.checkpoints import Checkpoints
from rayjobs.dreambooth.validation import Watch
from rayjobs.models import exports
from rayjobs.models.facts import find_weights
from rayjobs.progress import Progress

MOST_TOKENS = 4
COMMON = 0.8


@dataclass(frozen=True)
class Summary:
    """What a run did; `steps` is 0 when there was nothing left to do."""

    steps: int
    seconds: float
    export_uri: str
    report_uri: str


def check(config: DreamBoothConfig) -> None:
    """Raise BadInput or StorageError for what can be known to be wrong before any work."""
    storage.check(config.output.uri, write=True)
    weights = find_weights(config.model.uri)
    photos = find_photos(config.instance.uri, config.instance.prompt)
    trackers.check(config)
    _warn(_check_identifier(config, weights))
    _warn(check_sizes(photos, config.train.resolution or weights.default_side))
    if weights.is_edm and config.train.min_snr_gamma is not None:
        raise BadInput(
            "train.min_snr_gamma is not defined for an EDM model; leave it out: "
            "the EDM loss has its own weights"
        )


def anchored(config: DreamBoothConfig) -> DreamBoothConfig:
    """The same run, whatever the working directory of those who read it."""

    def anchor(part: Any) -> Any:
        uri = part.uri
        is_path = uri is not None and (part is not config.model or Path(uri).exists())
        return part.model_copy(update={"uri": storage.absolute(uri)}) if is_path else part

    names = ("model", "instance", "prior", "output")
    return config.model_copy(update={name: anchor(getattr(config, name)) for name in names})


def is_finished(config: DreamBoothConfig) -> bool:
    return exports.read(export_uri(config)) is not None


def run(config: DreamBoothConfig) -> Summary:
    """Train, or go on training, until the last step; then export. Priors are there already.

    Raises BadInput when the folder holds another run, JobFailed when workers cannot go on.
    """
    started = time.monotonic()
    _enter(config)
    checkpoints = Checkpoints(storage.join(config.output.uri, "checkpoints"))
    first = config.train.steps if is_finished(config) else _steps_made(config, checkpoints)
    left = config.train.steps - first
    if not is_finished(config):
        with cluster.session(num_cpus(config)):
            with Watch(config) as watch:
                if left:
                    _train(config, first)
            for step, reason in watch.failures.items():
                _warn([f"the pictures after step {step} could not be made: {reason}"])
            _export(config, checkpoints)
    report.write(config)
    seconds = time.monotonic() - started
    return Summary(left, seconds, export_uri(config), config.output.uri)


def _steps_made(config: DreamBoothConfig, checkpoints: Checkpoints) -> int:
    """How far training is. The last checkpoint, which no worker reads, must be whole to count."""
    latest = max((each.step for each in checkpoints.list()), default=0)
    if latest < config.train.steps:
        return latest
    whole = checkpoints.latest()
    return whole.step if whole is not None else 0


def export_uri(config: DreamBoothConfig) -> str:
    return storage.join(config.output.uri, "export")


def _export(config: DreamBoothConfig, checkpoints: Checkpoints) -> None:
    """Export the best checkpoint, or the last where none was measured; keep what was asked for."""
    seen = results.read(config.output.uri)
    chosen = _choose(config, checkpoints, seen)
    found = next((result.metrics for result in seen if result.step == chosen), {})
    task = ray.remote(export.write).options(num_cpus=config.workers.num_cpus)
    try:
        ray.get(task.remote(config, chosen, export_uri(config), found))
    except ray.exceptions.RayError as error:
        raise cluster.unwrap_error(error) from None
    steps = [checkpoint.step for checkpoint in checkpoints.list()]
    checkpoints.prune(results.to_keep(steps, seen, config.checkpoint.keep, 0))


def _choose(config: DreamBoothConfig, checkpoints: Checkpoints, seen: list[Result]) -> int:
    """The step with the best score whose checkpoint is whole, else the last step."""
    there = {checkpoint.step: checkpoint for checkpoint in checkpoints.list()}
    left = [result for result in seen if result.step in there]
    while (best := results.best_step(left)) is not None:
        if checkpoints.is_whole(there[best]):
            return best
        left = [result for result in left if result.step != best]
    return config.train.steps


def _enter(config: DreamBoothConfig) -> None:
    photos = find_photos(config.instance.uri, config.instance.prompt)
    priors = []
    if config.prior.mode != "none":
        priors = find_photos(str(config.prior.uri), str(config.prior.prompt))
    lock.enter(
        config.output.uri,
        lock.describe(config, find_weights(config.model.uri).sha256, photos, priors),
    )


def _train(config: DreamBoothConfig, first: int) -> None:
    with (
        Progress(config.train.steps, "steps", first) as progress,
        tempfile.TemporaryDirectory(prefix="rayjobs-train-") as books,
    ):
        settings = {"config": config.model_dump(mode="json"), "counter": progress.counter}
        trainer = TorchTrainer(
            worker.train,
            train_loop_config=settings,
            scaling_config=_scaling(config.workers),
            # Ray's own books only: checkpoints go where the run is, by our own hand.
            run_config=RunConfig(
                name=config.run.name,
                storage_path=books,
                failure_config=FailureConfig(max_failures=config.workers.max_failures),
            ),
        )
        try:
            _fit(trainer)
        except (TrainingFailedError, ray.exceptions.RayError) as error:
            raise cluster.unwrap_error(error) from None
        notes: dict[str, Any] = ray.get(progress.counter.read.remote())[1]
        if worker.FATAL in notes:
            raise JobFailed(notes[worker.FATAL])


def _fit(trainer: TorchTrainer) -> None:
    """`trainer.fit()` in a thread: in the main one Ray takes Ctrl-C for itself and exits with 0."""
    ended: list[BaseException | None] = []

    def fit() -> None:
        try:
            trainer.fit()
            ended.append(None)
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=fit, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.5)
    if ended[0] is not None:
        raise ended[0]


def _scaling(workers: WorkersConfig) -> ScalingConfig:
    resources = {"CPU": workers.num_cpus}
    if workers.num_gpus:
        resources["GPU"] = workers.num_gpus
    settings: dict[str, Any] = {
        "num_workers": workers.min,
        "use_gpu": workers.num_gpus > 0,
        "resources_per_worker": resources,
    }
    if workers.max_workers > workers.min:
        settings["num_workers"] = (workers.min, workers.max_workers)
        settings["elastic_resize_monitor_interval_s"] = workers.resize_interval_s
    return ScalingConfig(**settings)


def num_cpus(config: DreamBoothConfig) -> float:
    """CPUs of all that may run at once."""
    beside = config.validation.num_cpus if config.validation.every_n_steps else 0
    return config.workers.max_workers * config.workers.num_cpus + beside


def _check_identifier(config: DreamBoothConfig, weights: Weights) -> list[str]:
    """Warnings for an identifier that means something already, or is many tokens."""
    word, folder = config.word, weights.path / "tokenizer"
    if config.inversion.num_vectors or not word or not folder.is_dir():
        return []
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(word, add_special_tokens=False).input_ids
    if len(ids) > MOST_TOKENS:
        return [f"the identifier {word!r} is {len(ids)} tokens; a rare one of up to 3 binds better"]
    # CLIP's byte pairs were learned in the order of how common they are.
    if len(ids) == 1 and ids[0] < COMMON * len(tokenizer):
        return [f"the identifier {word!r} is a common word, whose meaning would be overwritten"]
    return []


def _warn(warnings: list[str]) -> None:
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
