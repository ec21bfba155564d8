"""Validation beside training: each checkpoint that is due is looked at once, in a Ray task.

Owns which checkpoints are due. `samples` makes and measures the images.
"""

import contextlib
import threading
from collections.abc import Collection

import ray
import ray.exceptions

from rayjobs import storage
from rayjobs.dreambooth import results
from rayjobs.dreambooth.checkpoints import Checkpoints
from rayjobs.dreambooth.resolved import ResolvedRun

POLL_S = 2.0


class ValidationLoop:
    """A context in which every checkpoint that is due is validated, one at a time.

    At its end those still due are validated too, unless an error ended it.
    """

    def __init__(self, run: ResolvedRun):
        self.run = run
        self.failures: dict[int, str] = {}
        """Why a step could not be validated, by step."""
        self.num_made = 0
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
                while (step := due_step(self.run, self.failures.keys())) is not None:
                    self._validate(step)

    def _follow(self) -> None:
        while not self._stop.wait(POLL_S):
            with contextlib.suppress(storage.StorageError):  # an unreachable server comes back
                step = due_step(self.run, self.failures.keys())
                if step is not None:
                    self._validate(step)

    def _validate(self, step: int) -> None:
        resources = self.run.config.validation
        task = ray.remote(_validate_in_task).options(
            num_cpus=resources.num_cpus, num_gpus=resources.num_gpus
        )
        try:
            ray.get(task.remote(self.run, step))
            self.num_made += 1
        except ray.exceptions.RayError as error:
            self.failures[step] = str(error).strip().splitlines()[-1]


def due_step(run: ResolvedRun, without: Collection[int] = ()) -> int | None:
    """The next step to validate: step 0, before training, then every due checkpoint."""
    every, last = run.config.validation.every_n_steps, run.config.train.steps
    if not every:
        return None
    done = {result.step for result in results.read(run.config.output.uri)} | set(without)
    steps = [checkpoint.step for checkpoint in Checkpoints(run.checkpoints_uri).list()]
    due = [0, *(step for step in steps if step % every == 0 or step == last)]
    return next((step for step in due if step not in done), None)


def _validate_in_task(run: ResolvedRun, step: int) -> None:
    """The driver does without torch and the engine."""
    from rayjobs.dreambooth import samples

    samples.validate(run, step)
