"""The checkpoint callback: every K steps a copy of what is trained, stored beside training.

Owns what a checkpoint holds (trained weights, their average, the optimizer's moments, the step; no
random state, since there is none) and when it is written. One upload is under way at a time.
"""

import json
import shutil
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from rayjobs import storage
from rayjobs.dreambooth.checkpoints import Checkpoint, Checkpoints
from rayjobs.dreambooth.module import DreamBooth
from rayjobs.storage import StorageError

FILE = "state.pt"
METRICS = "metrics.jsonl"


class Saving(pl.Callback):
    """Writes checkpoints from rank 0, in the background, and the run's metrics with them."""

    def __init__(self, output_uri: str, every_n_steps: int, keep: int, every_validated: int):
        self.checkpoints = Checkpoints(storage.join(output_uri, "checkpoints"))
        self.metrics_uri = storage.join(output_uri, METRICS)
        self.every = every_n_steps
        self.keep = keep
        self.every_validated = every_validated
        self.stalled_s = 0.0
        self._rows: list[str] = []
        self._held: dict[str, Any] | None = None
        self._thread = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def resume(self, step: int) -> None:
        """Have training begin where the checkpoint of a step (0: none) was made."""
        if step == 0:
            return
        (checkpoint,) = [each for each in self.checkpoints.list() if each.step == step]
        self._held = read_state(self.checkpoints, checkpoint)
        self._rows = read_metrics(self.metrics_uri, step)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self._held is not None:
            restore(pl_module, self._held)
            self._held = None

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not trainer.is_global_zero:
            return
        self._rows.append(json.dumps(pl_module.metrics))
        if pl_module.step % self.every == 0 or pl_module.step == pl_module.config.train.steps:
            self._save(pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._finish()

    def _save(self, module: DreamBooth) -> None:
        self._finish()
        held, rows, step = _to_cpu(state(module)), "\n".join(self._rows) + "\n", module.step
        self._pending = self._thread.submit(self._store, step, held, rows)

    def _finish(self) -> None:
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def _store(self, step: int, held: dict[str, Any], rows: str) -> None:
        folder = Path(tempfile.mkdtemp(prefix="checkpoint-"))
        try:
            torch.save(held, folder / FILE)
            storage.write_bytes(self.metrics_uri, rows.encode())
            entry = self.checkpoints.put(step, FILE, folder / FILE)
            self.checkpoints.commit(step, {FILE: entry}, {"trained": len(held["trained"])})
        finally:
            shutil.rmtree(folder)
        self._prune()

    def _prune(self) -> None:
        """Keep the latest few, and those that are still to be looked at."""
        steps = [checkpoint.step for checkpoint in self.checkpoints.list()]
        keep = set(steps[-self.keep :])
        if self.every_validated:
            keep |= {step for step in steps if step % self.every_validated == 0}
        self.checkpoints.prune(keep)


def state(module: DreamBooth) -> dict[str, Any]:
    """All that a run needs to go on from here; plain tensors and numbers only."""
    trained = module.networks.trainable()
    return {
        "step": module.step,
        "trained": {name: parameter.detach() for name, parameter in trained.items()},
        "average": module.average,
        "optimizer": module.optimizer.state_dict(),
        "scaler": module.scaler.state_dict() if module.scaler is not None else {},
    }


def restore(module: DreamBooth, held: dict[str, Any]) -> None:
    """Put a state back; the module's optimizer is made already."""
    load_trained(module.networks.trainable(), held["trained"])
    load_trained(module.average, held["average"])
    module.optimizer.load_state_dict(held["optimizer"])
    if module.scaler is not None and held["scaler"]:
        module.scaler.load_state_dict(held["scaler"])
    module.step = held["step"]


def load_trained(into: dict[str, Any], held: dict[str, torch.Tensor]) -> None:
    if into.keys() != held.keys():
        raise ValueError("the checkpoint is of other weights than those that are trained")
    with torch.no_grad():
        for name, tensor in into.items():
            tensor.copy_(held[name])


def read_state(checkpoints: Checkpoints, checkpoint: Checkpoint) -> dict[str, Any]:
    """What `state` gave. Raises StorageError when a file is not as it was written."""
    folder = checkpoints.fetch(checkpoint)
    if folder is None:
        raise StorageError(f"{checkpoints.uri}: checkpoint {checkpoint.step} is not whole")
    try:
        held: dict[str, Any] = torch.load(folder / FILE, map_location="cpu", weights_only=True)
    finally:
        shutil.rmtree(folder)
    return held


def read_metrics(uri: str, last_step: int) -> list[str]:
    """The lines of steps 1 .. last_step."""
    if not storage.exists(uri):
        return []
    lines = storage.read_bytes(uri).decode().splitlines()
    return [line for line in lines if json.loads(line)["step"] <= last_step]


def _to_cpu(value: Any) -> Any:
    """A copy on the CPU that later steps do not change."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _to_cpu(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_cpu(item) for item in value]
    return value
