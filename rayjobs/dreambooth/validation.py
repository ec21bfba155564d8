"""Validation beside training: each checkpoint that is due is looked at once, in a Ray task.

Owns which checkpoints are due. `samples` makes and measures the images.
"""

import contextlib
import threading

import ray
import ray.exceptions

from rayjobs import storage
from rayjobs.dreambooth import results
from rayjobs.dreambooth.resolved import ResolvedRun
from rayjobs.dreambooth.training.checkpoints import Checkpoints

POLL_S = 2.0


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
        task = ray.remote(_validate_in_task).options(
            num_cpus=resources.num_cpus, num_gpus=resources.num_gpus
        )
        try:
            ray.get(task.remote(self.run, step))
        except ray.exceptions.RayError as error:
            self.failures[step] = str(error).strip().splitlines()[-1]


def _validate_in_task(run: ResolvedRun, step: int) -> None:
    """The driver does without torch and the engine."""
    from rayjobs.dreambooth import samples

    samples.validate(run, step)
