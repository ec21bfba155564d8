"""The Ray session of a job, and what a dead worker said.

Owns which cluster is used and how it is left. Knows nothing of what runs there.
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


@contextmanager
def session(num_cpus: float) -> Generator[None]:
    """The cluster that RAY_ADDRESS or a surrounding job names, else one of our own, ended after.

    One of our own has room for `num_cpus`: what this machine has too little of, its workers share.
    """
    for name in ("ray", "ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    own = is_own()
    if not ray.is_initialized():
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if own:
            cpus = max(os.cpu_count() or 1, math.ceil(num_cpus) + 1)
            quiet |= {"address": "local", "num_cpus": cpus, "include_dashboard": False}
        _init(quiet)
    try:
        yield
    finally:
        if own:
            ray.shutdown()


def is_own() -> bool:
    """Whether the session will be, or is, one that only this job uses, on this machine."""
    return not ray.is_initialized() and not os.environ.get("RAY_ADDRESS")


def told(error: Exception) -> Exception:
    """What ended a worker, in its own words."""
    for kind in (BadInput, StorageError):
        words = rf"{kind.__module__}\.\w+: (.+?)(?=\n\n|\nFailed to apply|\Z)"
        found = re.findall(words, str(error), re.DOTALL)
        if found:
            return BadInput(found[-1]) if kind is BadInput else JobFailed(found[-1])
    lines = [line for line in str(error).splitlines() if re.match(r"\S*(Error|Exception)\b", line)]
    reason = lines[-1] if lines else str(error).strip().splitlines()[-1]
    return JobFailed(reason.removeprefix("rayjobs.diffusion.faults."))


def _init(options: dict[str, Any]) -> None:
    """Start or join Ray; it takes SIGTERM for itself, which here means what the caller says."""
    on_term = signal.getsignal(signal.SIGTERM)
    ray.init(**options)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_term)
