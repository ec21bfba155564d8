"""Workers on Ray: Ray Data carries shard numbers to them and their entries back.

Owns the session, the blocks, the pool and how the end of a worker is told. Knows nothing of how
shards are made; no pixel passes through here.
"""

import logging
import math
import os
import re
import signal
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import ray
import ray.data
import ray.exceptions

from rayjobs import storage
from rayjobs.config import BadInput, JobFailed
from rayjobs.diffusion.faults import DeviceLost
from rayjobs.generation.config import GenerateConfig
from rayjobs.generation.lock import Lock
from rayjobs.generation.manifest import Entry
from rayjobs.generation.progress import Progress
from rayjobs.generation.worker import Redo, ShardWorker

T = TypeVar("T")
MOST_IN_BLOCK = 64
PATIENCE_S = 900.0
"""How long workers wait for a storage server that is away."""
MOST_DEATHS_AT_START = 3


class RayShardWorker:
    """What Ray Data calls: a block of shard numbers in, an entry for each committed shard out."""

    def __init__(
        self, config: dict[str, Any], lock: dict[str, Any], segment: int, redo: Any, progress: Any
    ):
        storage.be_patient(PATIENCE_S)
        self.progress = progress
        self.worker = ShardWorker(
            GenerateConfig.model_validate(config),
            Lock.model_validate(lock),
            segment,
            redo=redo,
            report=self._report,
        )

    def __call__(self, batch: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        try:
            for entry in self.worker.make(int(n) for shards in batch["shards"] for n in shards):
                yield {key: np.array([value]) for key, value in entry.items()}
        except DeviceLost:
            # An error would end the job; the end of this process makes Ray start another one.
            logging.getLogger("rayjobs").exception("the device is lost; ending this worker")
            os._exit(1)

    def _report(self, images: int, failed: int) -> None:
        self.progress.add.remote(images, failed)


def make(
    config: GenerateConfig,
    lock: Lock,
    segment: int,
    shards: np.ndarray,
    redo: Redo | None,
    num_images: int,
) -> Iterator[Entry]:
    """Make shards of a segment on a pool of workers; yield the entry of each once committed."""
    workers = config.workers
    most = min(workers.max or workers.min, len(shards))
    with Progress(num_images) as progress:
        rows = blocks(shards, most).map_batches(
            RayShardWorker,
            fn_constructor_args=(
                config.model_dump(mode="json"),
                lock.model_dump(mode="json"),
                segment,
                redo,
                progress.counter,
            ),
            compute=ray.data.ActorPoolStrategy(min_size=min(workers.min, most), max_size=most),
            batch_size=1,
            num_cpus=workers.num_cpus,
            num_gpus=workers.num_gpus or None,
        )
        try:
            yield from rows.iter_rows()
        except ray.exceptions.RayError as error:
            raise _told(error) from None


def blocks(shards: np.ndarray, workers: int) -> ray.data.Dataset:
    """One row a block, one block a task: many shards each, fewer towards the end.

    Large blocks keep a worker's batch full and Ray's books short; small ones at the end let all
    workers finish together.
    """
    rows, at = [], 0
    while at < len(shards):
        size = min(MOST_IN_BLOCK, max(1, (len(shards) - at) // (4 * workers)))
        rows.append({"shards": shards[at : at + size].tolist()})
        at += size
    return ray.data.from_items(rows, override_num_blocks=len(rows))


@contextmanager
def session(config: GenerateConfig) -> Generator[None]:
    """The cluster that RAY_ADDRESS or a surrounding job names, else one of our own, ended after."""
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    own = is_own()
    if not ray.is_initialized():
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if own:
            # Room for all workers: what this machine has too little of, they share.
            workers = config.workers
            needed = math.ceil((workers.max or workers.min) * workers.num_cpus) + 1
            cpus = max(os.cpu_count() or 1, needed)
            quiet |= {"address": "local", "num_cpus": cpus, "include_dashboard": False}
        _init(quiet)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.verbose_progress = False
    context.execution_no_progress_timeout_s = -1
    context.max_consecutive_actor_init_deaths = MOST_DEATHS_AT_START
    try:
        yield
    finally:
        if own:
            ray.shutdown()


def _init(options: dict[str, Any]) -> None:
    """Start or join Ray; it takes SIGTERM for itself, which here means what the caller says."""
    on_term = signal.getsignal(signal.SIGTERM)
    ray.init(**options)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_term)


def is_own() -> bool:
    """Whether the session will be, or is, one that only this job uses, on this machine."""
    return not ray.is_initialized() and not os.environ.get("RAY_ADDRESS")


def ask(config: GenerateConfig, question: Callable[[GenerateConfig], T]) -> T:
    """`question(config)` as a task wherever the cluster would place a worker."""
    workers = config.workers
    task = ray.remote(question).options(num_cpus=workers.num_cpus, num_gpus=workers.num_gpus)
    try:
        found: T = ray.get(task.remote(config))
    except ray.exceptions.RayError as error:
        raise _told(error) from None
    return found


def _told(error: Exception) -> Exception:
    """What ended a worker, in its own words."""
    for kind in (BadInput, storage.StorageError):
        words = rf"{kind.__module__}\.\w+: (.+?)(?=\n\n|\nFailed to apply|\Z)"
        found = re.findall(words, str(error), re.DOTALL)
        if found:
            return BadInput(found[-1]) if kind is BadInput else JobFailed(found[-1])
    lines = [line for line in str(error).splitlines() if re.match(r"\S*(Error|Exception)\b", line)]
    reason = lines[-1] if lines else str(error).strip().splitlines()[-1]
    return JobFailed(reason.removeprefix("rayjobs.diffusion.faults."))
