"""The Ray session of a job, and the error of a failed worker.

Owns which cluster is used and when it is shut down. Knows nothing of what runs there.
"""

import logging
import math
import os
import re
import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import ray

from rayjobs.config import BadInput, JobFailed
from rayjobs.storage import StorageError

REMEMBER_ADDRESS = {"worker_process_setup_hook": "rayjobs.cluster.remember_address"}
"""The runtime environment of a local cluster: there may be another one on the machine."""


@contextmanager
def session(num_cpus: float) -> Generator[None]:
    """The cluster that RAY_ADDRESS or a surrounding job names, else a local one, shut down after.

    A local one has at least `num_cpus`; where the machine has fewer, workers share them.
    """
    for name in ("ray", "ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    own = is_own()
    if not ray.is_initialized():
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if own:
            cpus = max(os.cpu_count() or 1, math.ceil(num_cpus) + 1)
            quiet |= {"address": "local", "num_cpus": cpus, "include_dashboard": False}
            quiet["runtime_env"] = REMEMBER_ADDRESS
        _init(quiet)
    try:
        yield
    finally:
        if own:
            ray.shutdown()


def remember_address() -> None:
    """In a worker: Ray's state API, by which Ray Train sees who lives, asks this cluster.

    Without the variable it asks the one that was started last on the machine, finds no controller
    there, and ends a training that runs.
    """
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address


def is_own() -> bool:
    """Whether the session will be, or is, a local one that only this job uses."""
    return not ray.is_initialized() and not os.environ.get("RAY_ADDRESS")


def unwrap_error(error: Exception) -> Exception:
    """The worker's own error inside one of Ray's, as BadInput or JobFailed."""
    for kind in (BadInput, StorageError):
        pattern = rf"{kind.__module__}\.\w+: (.+?)(?=\n\n|\nFailed to apply|\Z)"
        messages = re.findall(pattern, str(error), re.DOTALL)
        if messages:
            return BadInput(messages[-1]) if kind is BadInput else JobFailed(messages[-1])
    lines = [line for line in str(error).splitlines() if re.match(r"\S*(Error|Exception)\b", line)]
    reason = lines[-1] if lines else str(error).strip().splitlines()[-1]
    return JobFailed(reason.removeprefix("rayjobs.diffusion.faults."))


def _init(options: dict[str, Any]) -> None:
    """Start or join Ray, keeping the caller's SIGTERM handler, which Ray replaces."""
    on_term = signal.getsignal(signal.SIGTERM)
    ray.init(**options)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_term)
