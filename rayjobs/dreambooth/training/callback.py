"""The checkpoint callback: every K steps a copy of what is trained, uploaded in the background.

Owns what a checkpoint holds (trained weights, their average, the optimizer's moments, the step; no
random state, since there is none) and when it is written. Uploads one checkpoint at a time.
"""

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from rayjobs import storage
from rayjobs.dreambooth import lock, results
from rayjobs.dreambooth.checkpoints import Checkpoint, Checkpoints
from rayjobs.dreambooth.resolved import ResolvedRun
from rayjobs.dreambooth.training import fsdp, trackers
from rayjobs.dreambooth.training.module import DreamBooth
from rayjobs.dreambooth.training.tuned_model import TunedModel
from rayjobs.storage import StorageError

FILE = "state.pt"
PART_WAIT_S = 1800.0
POLL_S = 1.0
NOTICE_EVERY_STEPS = 5
"""Steps between two looks for a notice; workers wait for each other in each."""


class CheckpointCallback(pl.Callback):
    """Writes checkpoints in the background, and the run's metrics with them.

    Rank 0 writes an unsharded state. Of a sharded one every rank writes its part, and rank 0 the
    note that commits them. `attempt` names this start of the workers, so that parts from an
    earlier start are not mixed in.
    """

    def __init__(self, run: ResolvedRun, rank: int, num_workers: int, sharded: bool, attempt: str):
        self.run, self.uri, self.config = run, run.config.output.uri, run.config
        self.checkpoints = Checkpoints(run.checkpoints_uri)
        self.rank, self.num_workers = rank, num_workers
        self.sharded, self.attempt = sharded, attempt
        self.logs = Path(tempfile.mkdtemp(prefix="logs-"))
        """A local folder that trackers write to; it is uploaded with every checkpoint."""
        self.stopped_with_patience: int | None = None
        self.stalled_s = 0.0
        """How long training has waited for checkpoints."""
        self.num_stored, self.stored_s = 0, 0.0
        """Checkpoints stored, and how long that took beside the training."""
        self._rows: list[str] = []
        self._start: Checkpoint | None = None
        self._thread = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def resume(self, step: int) -> None:
        """Make training start from the checkpoint of a step; 0 is no checkpoint."""
        if step:
            checkpoints = self.checkpoints.list()
            (self._start,) = [checkpoint for checkpoint in checkpoints if checkpoint.step == step]
            self._rows = read_metrics(storage.join(self.uri, results.METRICS), step)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self._start is not None:
            folder = _fetch(self.checkpoints, self._start)
            restore(pl_module, folder, self.sharded)
            shutil.rmtree(folder)
            pl_module.step, self._start = self._start.step, None

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._rows.append(json.dumps(pl_module.metrics))
        self.stopped_with_patience = pl_module.stopped_with_patience
        if self._is_due(pl_module.step):
            self._save(pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        started = time.perf_counter()
        self._wait_for_upload()
        self.stalled_s += time.perf_counter() - started
        if self.rank == 0:
            trackers.close(pl_module.loggers)
            trackers.store(self.uri, self.logs)
        shutil.rmtree(self.logs, ignore_errors=True)

    def save_now(self, module: DreamBooth) -> None:
        """Save this step, where that is not done anyway."""
        if not self._is_due(module.step):
            if self.rank == 0:
                print(
                    f"a machine will be taken away: checkpoint at step {module.step}",
                    file=sys.stderr,
                    flush=True,
                )
            self._save(module)

    def _is_due(self, step: int) -> bool:
        is_last = step == self.config.train.steps
        return step % self.config.checkpoint.every_n_steps == 0 or is_last

    def _save(self, module: DreamBooth) -> None:
        if self.rank and not self.sharded:
            return
        started = time.perf_counter()
        self._wait_for_upload()
        trackers.flush(module.loggers)
        folder, rows = Path(tempfile.mkdtemp(prefix="checkpoint-")), "\n".join(self._rows) + "\n"
        if self.sharded:
            fsdp.write(folder, module)
            self._pending = self._thread.submit(self._store_part, module.step, folder, rows)
        else:
            copy = _to_cpu(state(module))
            self._pending = self._thread.submit(self._store, module.step, folder, copy, rows)
        self.stalled_s += time.perf_counter() - started

    def _wait_for_upload(self) -> None:
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def _store(self, step: int, folder: Path, state: dict[str, Any], rows: str) -> None:
        started = time.perf_counter()
        try:
            torch.save(state, folder / FILE)
            entry = self.checkpoints.put(step, FILE, folder / FILE)
        finally:
            shutil.rmtree(folder)
        self._commit(step, {FILE: entry}, rows)
        self._count(started)

    def _store_part(self, step: int, folder: Path, rows: str) -> None:
        """Store this rank's files; rank 0 then waits for the others' and commits."""
        started = time.perf_counter()
        try:
            files = {
                f"{self.attempt}/{path.name}": self.checkpoints.put(
                    step, f"{self.attempt}/{path.name}", path
                )
                for path in sorted(folder.iterdir())
            }
        finally:
            shutil.rmtree(folder)
        self.checkpoints.put_note(step, self._part(self.rank), files)
        if self.rank == 0:
            deadline = time.monotonic() + PART_WAIT_S
            for rank in range(1, self.num_workers):
                while (part := self.checkpoints.note(step, self._part(rank))) is None:
                    if time.monotonic() > deadline:
                        raise StorageError(f"{self.uri}: worker {rank} stored no part of {step}")
                    time.sleep(POLL_S)
                files |= part
            self._commit(step, files, rows)
        self._count(started)

    def _count(self, started: float) -> None:
        self.num_stored += 1
        self.stored_s += time.perf_counter() - started

    def _part(self, rank: int) -> str:
        return f"{self.attempt}/part-{rank:05d}.json"

    def _commit(self, step: int, files: dict[str, dict[str, Any]], rows: str) -> None:
        # A run that has made nothing may have been begun anew meanwhile, with other settings.
        lock.check_own(self.uri, lock.describe(self.run))
        storage.write_bytes(storage.join(self.uri, results.METRICS), rows.encode())
        trackers.store(self.uri, self.logs)
        facts: dict[str, Any] = {"workers": self.num_workers}
        if self.stopped_with_patience is not None:
            facts["stopped_with_patience"] = self.stopped_with_patience
        self.checkpoints.commit(step, files, facts)
        steps = [checkpoint.step for checkpoint in self.checkpoints.list()]
        keep, every = self.config.checkpoint.keep, self.config.validation.every_n_steps
        kept = results.to_keep(steps, results.read(self.uri), keep, every)
        if self.config.validation.patience is not None:
            least = results.step_of_least(results.read_losses(self.uri, step))
            kept |= {least} - {None}  # type: ignore
        self.checkpoints.prune(kept)


class CheckpointOnNotice(pl.Callback):
    """Writes a checkpoint at once when a worker's machine will be taken away.

    All workers call `find`, Ray Train's, at the same steps: it waits for each of them.
    """

    def __init__(self, checkpointing: CheckpointCallback, find: Callable[[], Any]):
        self._checkpointing, self._find = checkpointing, find
        self._known: Any = None

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if pl_module.step % NOTICE_EVERY_STEPS == 0:
            found = self._find()
            if found is not None and found != self._known:
                self._known = found
                self._checkpointing.save_now(pl_module)


def state(module: DreamBooth) -> dict[str, Any]:
    """All that a run needs to resume; plain tensors and numbers only."""
    trained = module.tuned.trainable()
    return {
        "step": module.step,
        "trained": {name: parameter.detach() for name, parameter in trained.items()},
        "average": module.average,
        "optimizer": module.optimizer.state_dict(),
        "scaler": module.scaler.state_dict() if module.scaler is not None else {},
    }


def restore(module: DreamBooth, folder: Path, sharded: bool) -> None:
    """Load a state into the module, whose optimizer exists already."""
    if sharded:
        fsdp.read(_dcp_folder(folder), module)
        return
    state = torch.load(folder / FILE, map_location="cpu", weights_only=True)
    _copy(module.tuned.trainable(), state["trained"])
    _copy(module.average, state["average"])
    module.optimizer.load_state_dict(state["optimizer"])
    if module.scaler is not None and state["scaler"]:
        module.scaler.load_state_dict(state["scaler"])


def load_weights(checkpoints: Checkpoints, checkpoint: Checkpoint, tuned: TunedModel) -> None:
    """Load a checkpoint's weights, or their average where one is kept, in a single process."""
    folder = _fetch(checkpoints, checkpoint)
    try:
        averaged, into = tuned.averaged, tuned.trainable()
        if FILE in checkpoint.files:
            state = torch.load(folder / FILE, map_location="cpu", weights_only=True)
            _copy(into, state["average" if averaged else "trained"])
        else:
            fsdp.read_weights(_dcp_folder(folder), into, averaged)
    finally:
        shutil.rmtree(folder)


def read_metrics(uri: str, last_step: int) -> list[str]:
    """The lines of steps 1 .. last_step."""
    if not storage.exists(uri):
        return []
    lines = storage.read_bytes(uri).decode().splitlines()
    return [line for line in lines if json.loads(line)["step"] <= last_step]


def _fetch(checkpoints: Checkpoints, checkpoint: Checkpoint) -> Path:
    folder = checkpoints.fetch(checkpoint)
    if folder is None:
        raise StorageError(f"{checkpoints.uri}: checkpoint {checkpoint.step} is not whole")
    return folder


def _dcp_folder(folder: Path) -> Path:
    """The folder with the shards: below the name of the attempt that wrote them."""
    return next(folder.rglob(".metadata")).parent


def _copy(into: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    if into.keys() != tensors.keys():
        raise ValueError("the checkpoint holds other weights than those that are trained")
    with torch.no_grad():
        for name, tensor in into.items():
            tensor.copy_(tensors[name])


def _to_cpu(value: Any) -> Any:
    """A copy on the CPU, which later steps leave alone."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _to_cpu(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_cpu(item) for item in value]
    return value
