"""A DreamBooth run: lock, train on Ray Train's workers, export the best checkpoint, report.

Owns this order and the workers' resources. A run's only state is its folder: run.lock.json,
checkpoints/ and export/. Gets the run resolved; looks nothing up itself. What runs in workers is
imported there: the driver and Ray's controller start without Lightning and diffusers.
"""

import dataclasses
import os
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from typing import Any

import ray
import ray.exceptions
from ray.train.torch import TorchTrainer
from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.exceptions import TrainingFailedError

from rayjobs import cluster
from rayjobs.config import BadInput, JobFailed
from rayjobs.dreambooth import lock, report, results, validation
from rayjobs.dreambooth.checkpoints import Checkpoints
from rayjobs.dreambooth.config import DreamBoothConfig, WorkersConfig
from rayjobs.dreambooth.resolved import ResolvedRun
from rayjobs.dreambooth.results import Result
from rayjobs.dreambooth.validation import ValidationLoop
from rayjobs.models import exports
from rayjobs.models.exports import ExportNote
from rayjobs.progress import BEGAN, DEVICE, FATAL, LAST, Progress
from rayjobs.reports import figures
from rayjobs.reports.rewriter import Rewriter
from rayjobs.reports.running import Running
from rayjobs.room import await_room
from rayjobs.storage import StorageError

GROUP_START_S = "15"
"""How long Ray Train waits for room that it has been told of: after a lost host it is told of that
one's for up to 20 s more, and asks again with less only when this time is over (its own: 60)."""


@dataclass(frozen=True)
class Summary:
    """What a run did; `steps` is 0 when there was nothing left to train."""

    steps: int
    seconds: float
    export_uri: str
    report_uri: str | None
    """Of the run's page; None where it could not be written."""
    training_s: float = 0.0
    """Of the seconds, those from the first step's beginning to the last one's end."""
    was_finished: bool = False
    """Whether it was there already, and nothing at all was done."""


def is_finished(run: ResolvedRun) -> bool:
    """Whether all of its steps are made, and exported."""
    note = exports.read(run.export_uri)
    if note is None:
        return False
    steps = note.steps or lock.num_steps(run.config.output.uri)
    has_more_patience = _has_stopped(run, Checkpoints(run.checkpoints_uri)) is False
    return steps >= run.config.train.steps and not has_more_patience


def is_complete(run: ResolvedRun) -> bool:
    """Whether a finished run has all the outputs, and was looked at, as its settings ask for."""
    note = exports.read(run.export_uri)
    is_whole = note is not None and _has_outputs(run, note) and report.is_written(run)
    return is_whole and validation.due_step(run) is None


def _has_outputs(run: ResolvedRun, note: ExportNote) -> bool:
    """Whether the files are there that the settings ask for, in the dtype that they ask for."""
    wanted, kind = run.config.output, run.config.export_kind
    fused = wanted.fused and kind != "full"
    has_kohya = not wanted.kohya or kind != "lora" or exports.KOHYA_FILE in note.files
    has_peft = not wanted.peft or kind != "lora" or _has_folder(note, exports.PEFT_FOLDER)
    has_fused = not fused or f"{exports.FUSED}/model_index.json" in note.files
    same_dtype = note.dtype in ("", wanted.dtype) or not (fused or kind == "full")
    return has_kohya and has_peft and has_fused and same_dtype


def _has_folder(note: ExportNote, folder: str) -> bool:
    return any(name.startswith(f"{folder}/") for name in note.files)


def run(run: ResolvedRun) -> Summary:
    """Train, or go on training, until the last step; then export. Of a finished run what is left.

    Raises BadInput when the folder holds another run, JobFailed when workers cannot go on.
    """
    started, config = time.monotonic(), run.config
    _remember_steps(run)
    finished = is_finished(run)
    # A finished run's class images may be gone.
    lock.enter(config.output.uri, lock.describe(run), ("priors",) if finished else ())
    checkpoints = Checkpoints(run.checkpoints_uri)
    has_ended = finished or _has_stopped(run, checkpoints)
    first = config.train.steps if has_ended else _num_steps_done(run, checkpoints)
    num_left = config.train.steps - first
    page = _Page(run, num_left)
    with cluster.session(num_cpus(config)), page:
        with ValidationLoop(run) as looks:
            if num_left:
                await_room(config.workers, config.workers.min, cluster.is_owned())
                _train(run, first, page)
        for step, reason in looks.failures.items():
            print(
                f"warning: the pictures after step {step} could not be made: {reason}",
                file=sys.stderr,
            )
        note = exports.read(run.export_uri)
        if note is None or not finished or looks.num_made or not _has_outputs(run, note):
            keeps_step = note is not None and finished and not looks.num_made
            _export(run, checkpoints, note.step if note is not None and keeps_step else None)
    made = min(num_left, max(0, _last_step(checkpoints) - first))
    page_uri = _write_page(run, page.work(made))
    seconds = time.monotonic() - started
    return Summary(made, seconds, run.export_uri, page_uri, page.training_s)


class _Page(Rewriter):
    """The run's page, which follows the training as its progress tells it."""

    def __init__(self, run: ResolvedRun, num_left: int):
        super().__init__(self._write_page)
        self.progress: Progress | None = None
        self._run, self._num_left = run, num_left
        self._done, self._notes = 0, dict[str, Any]()

    def _write_page(self, again_by: float | None) -> bool:
        self.look()
        rate = self._done / self.training_s if self.training_s else 0.0
        running = Running(time.time(), again_by, self._done, self._num_left, rate, "steps")
        report.write(self._run, running, self.work(self._done))
        return True

    def look(self) -> None:
        """Take in the progress; once its workers are gone what was seen last stays."""
        if self.progress is not None and (read := self.progress.read())[1]:
            self._done, self._notes = max(0, read[0] - self.progress.initial), read[1]

    @property
    def training_s(self) -> float:
        if self.progress is not None and self.progress.worked_s is not None:
            return self.progress.worked_s
        return self._notes.get(LAST, 0.0) - self._notes.get(BEGAN, 0.0) if self._done else 0.0

    def work(self, steps: int) -> dict[str, str]:
        """How the steps of this run were made, for its page."""
        if not steps or not self.training_s:
            return {}
        speed = f"{figures.rate(steps / self.training_s)} steps/s"
        workers = figures.count(self._notes.get("workers", 1), "worker")
        hours = self.training_s * self._notes.get("workers", 1) / 3600
        return {
            "Speed": f"{speed} over {figures.duration(self.training_s)}, by {workers}",
            "Device": str(self._notes.get(DEVICE, "")),
            "Cost": f"{hours:,.3g} device-hours of training",
        }


def _write_page(run: ResolvedRun, work: dict[str, str]) -> str | None:
    """The page's URI. Without it a run is done all the same; the same command tries again."""
    try:
        return report.write(run, work=work)
    except (BadInput, StorageError) as error:
        print(f"warning: the run's page could not be written: {error}", file=sys.stderr)
        return None


def _last_step(checkpoints: Checkpoints) -> int:
    return max((checkpoint.step for checkpoint in checkpoints.list()), default=0)


def _remember_steps(run: ResolvedRun) -> None:
    """Have the note of an older version say of how many steps the export is: there may be more."""
    note = exports.read(run.export_uri)
    if note is not None and not note.steps:
        steps = lock.num_steps(run.config.output.uri)
        exports.write(run.export_uri, dataclasses.replace(note, steps=steps))


def _num_steps_done(run: ResolvedRun, checkpoints: Checkpoints) -> int:
    """The step of the latest checkpoint.

    The last step's is read to see that it is whole: no worker will read it before it is exported.
    """
    latest = max((checkpoint.step for checkpoint in checkpoints.list()), default=0)
    if latest < run.config.train.steps:
        return latest
    whole = checkpoints.latest()
    return whole.step if whole is not None else 0


def _has_stopped(run: ResolvedRun, checkpoints: Checkpoints) -> bool | None:
    """Whether the run ended early, by a patience that is no less than now; None: it did not end."""
    patience = run.config.validation.patience
    last = checkpoints.list()[-1:]
    at = last[0].facts.get("stopped_with_patience") if last else None
    return None if at is None else patience is not None and at >= patience


def _export(run: ResolvedRun, checkpoints: Checkpoints, step: int | None) -> None:
    """Export the checkpoint of `step`, or the best one, or the last where none was measured.

    Others are pruned.
    """
    validated = results.read(run.config.output.uri)
    steps = [checkpoint.step for checkpoint in checkpoints.list()]
    step = _choose(run, checkpoints, validated) if step is None else step
    if step not in steps:
        raise BadInput(
            f"{run.checkpoints_uri} lacks the checkpoint of step {step}, which is exported; take "
            "back the changed output or validation, or give another output.uri"
        )
    metrics = next((result.metrics for result in validated if result.step == step), {})
    task = ray.remote(_write_export).options(num_cpus=run.config.workers.num_cpus)
    try:
        ray.get(task.remote(run, step, metrics))
    except ray.exceptions.RayError as error:
        raise cluster.unwrap_error(error) from None
    if not validated:
        _draw(run, step)
    checkpoints.prune(results.to_keep(steps, validated, run.config.checkpoint.keep, 0))


def _draw(run: ResolvedRun, step: int) -> None:
    """Have a picture made by what is exported, where workers would fit: nothing depends on it."""
    workers = run.config.workers
    if ray.cluster_resources().get("GPU", 0) < workers.num_gpus:
        return
    task = ray.remote(_draw_in_task).options(num_cpus=workers.num_cpus, num_gpus=workers.num_gpus)
    try:
        ray.get(task.remote(run, step))
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[-1]
        print(f"warning: no picture of the export could be made: {reason}", file=sys.stderr)


def _choose(run: ResolvedRun, checkpoints: Checkpoints, validated: list[Result]) -> int:
    """The step with the best score whose checkpoint is whole, else with the least loss at fixed
    noise where a patience waits for that, else the last step."""
    by_step = {checkpoint.step: checkpoint for checkpoint in checkpoints.list()}
    candidates = [result for result in validated if result.step in by_step]
    while (best := results.best_step(candidates)) is not None:
        if checkpoints.is_whole(by_step[best]):
            return best
        candidates = [result for result in candidates if result.step != best]
    if run.config.validation.patience is not None:
        losses = results.read_losses(run.config.output.uri, run.config.train.steps)
        whole = {step for step in by_step if checkpoints.is_whole(by_step[step])}
        least = results.step_of_least([loss for loss in losses if loss[0] in whole])
        if least is not None:
            return least
    return run.config.train.steps


def _train(run: ResolvedRun, first: int, page: _Page) -> None:
    config = run.config
    with (
        Progress(config.train.steps, "steps", first) as progress,
        progress.watch(config.workers.max_stall_s),
        tempfile.TemporaryDirectory(prefix="rayjobs-train-") as ray_files,
    ):
        page.progress = progress
        settings = {"run": run, "counter": progress.counter}
        trainer = TorchTrainer(
            _train_worker,
            train_loop_config=settings,
            scaling_config=_scaling(config.workers),
            # For Ray's own files only: the checkpoints go to the run's folder, by our callback.
            run_config=RunConfig(
                name=config.run.name,
                storage_path=ray_files,
                failure_config=FailureConfig(max_failures=config.workers.max_failures),
            ),
        )
        try:
            _fit(trainer)
        except (TrainingFailedError, ray.exceptions.RayError) as error:
            raise cluster.unwrap_error(error) from None
        page.look()
        notes: dict[str, Any] = ray.get(progress.counter.read.remote())[1]
        if FATAL in notes:
            raise JobFailed(notes[FATAL])


def _train_worker(settings: dict[str, Any]) -> None:
    from rayjobs.dreambooth.training import worker

    worker.train(settings)


def _write_export(run: ResolvedRun, step: int, metrics: dict[str, float]) -> None:
    from rayjobs.dreambooth import export

    export.write(run, step, metrics)


def _draw_in_task(run: ResolvedRun, step: int) -> None:
    from rayjobs.dreambooth import samples

    samples.draw(run, step)


def _fit(trainer: TorchTrainer) -> None:
    """`trainer.fit()` in a thread: in the main one Ray handles Ctrl-C itself and exits with 0."""
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
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", GROUP_START_S)
        settings["num_workers"] = (workers.min, workers.max_workers)
        settings["elastic_resize_monitor_interval_s"] = workers.resize_interval_s
    return ScalingConfig(**settings)


def num_cpus(config: DreamBoothConfig) -> float:
    """CPUs of all that may run at once."""
    beside = config.validation.num_cpus if config.validation.every_n_steps else 0
    return config.workers.max_workers * config.workers.num_cpus + beside
