"""Workers on Ray: Ray Data carries shard numbers to them and their entries back.

Owns the blocks and the pool. Knows nothing of how
shards are made; no pixel passes through here.
"""

import logging
import os
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import ray
import ray.data
import ray.exceptions

from rayjobs import cluster, storage
from rayjobs.dataset.lock import Lock
from rayjobs.dataset.manifest import Entry
from rayjobs.diffusion.faults import DeviceLost
from rayjobs.generation.config import GenerateConfig
from rayjobs.generation.worker.shards import Redo, ShardWorker
from rayjobs.progress import Progress

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
    most = min(workers.most, len(shards))
    with Progress(num_images, "images") as progress:
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
            raise cluster.told(error) from None


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
    """The cluster to run on, as `cluster.session`, with Ray Data set for long jobs."""
    workers = config.workers
    with cluster.session(workers.most * workers.num_cpus):
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.execution_options.verbose_progress = False
        context.execution_no_progress_timeout_s = -1
        context.max_consecutive_actor_init_deaths = MOST_DEATHS_AT_START
        yield


def ask(config: GenerateConfig, question: Callable[[GenerateConfig], T]) -> T:
    """`question(config)` as a task wherever the cluster would place a worker."""
    workers = config.workers
    task = ray.remote(question).options(num_cpus=workers.num_cpus, num_gpus=workers.num_gpus)
    try:
        found: T = ray.get(task.remote(config))
    except ray.exceptions.RayError as error:
        raise cluster.told(error) from None
    return found
