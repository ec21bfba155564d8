"""Workers on Ray: Ray Data carries shard numbers to them and their entries back.

Owns the pool. Knows nothing of how shards are made; no pixel passes
through here. The engine is imported where it works, so that a driver starts without it.
"""

import logging
import math
import os
import time
import uuid
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import ray
import ray.data
import ray.exceptions
from ray._private import state as ray_state

from rayjobs import cluster, storage
from rayjobs.config import Workers
from rayjobs.dataset.lock import Lock
from rayjobs.dataset.manifest import Entry
from rayjobs.generation.config import GenerateConfig
from rayjobs.generation.resolved import ResolvedConfig
from rayjobs.generation.spec.records import Redo
from rayjobs.generation.worker import blocks
from rayjobs.generation.worker.notice import Notice
from rayjobs.progress import Progress, Reporter, report_every_s
from rayjobs.reports.history import Activity
from rayjobs.room import await_room, check_machine
from rayjobs.telemetry.meters import RayMeters
from rayjobs.watchdog import Beat

T = TypeVar("T")
STORAGE_PATIENCE_S = 900.0
"""How long workers wait for a storage server that is away."""
MAX_DEATHS_AT_START = 3


class RayShardWorker:
    """What Ray Data calls: a block of shard numbers in, an entry for each committed shard out."""

    def __init__(
        self, config: dict[str, Any], lock: dict[str, Any], segment: int, run: str, **others: Any
    ):
        storage.be_patient(STORAGE_PATIENCE_S)
        self.progress = others["progress"]
        self.reporter = Reporter(self.progress, others["report_every_s"])
        name = f"worker {os.uname().nodename}-{os.getpid()}"
        self.beat = Beat(name, self.progress.beat.remote)
        with self.beat.working(lambda: "its start"):
            self.worker = self._worker(config, lock, segment, run, others["redo"])
        self.progress.join.remote(self.worker.name)
        node = ray.get_runtime_context().get_node_id()
        self.notice = Notice(lambda: _taken_away_in_s(node), self.worker.drop)
        self.worker.takes_more = lambda: not self.notice.is_given()

    def _worker(
        self,
        config: dict[str, Any],
        lock: dict[str, Any],
        segment: int,
        run: str,
        redo: Redo | None,
    ) -> Any:
        from rayjobs.generation.worker.attempts import Attempts
        from rayjobs.generation.worker.shards import ShardWorker

        job = GenerateConfig.model_validate(config)
        node = ray.get_runtime_context().get_node_id()
        worker = ShardWorker(
            job,
            Lock.model_validate(lock),
            segment,
            redo=redo,
            report=self.reporter.add,
            attempts=Attempts(job.output.uri, run, node, _is_alive),
        )
        worker.count_with(RayMeters(job.output.uri))
        return worker

    def __call__(self, batch: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        self.progress.begin.remote()
        engine = self.worker.generator.engine
        with exit_if_device_lost(), self.beat.working(self.worker.place, lambda: engine.num_steps):
            for entry in self.worker.make(int(n) for shards in batch["shards"] for n in shards):
                yield {key: np.array([value]) for key, value in entry.items()}
            self.reporter.flush()
            self.notice.leave()  # what is left of these shards is another worker's


def _is_alive(node: str) -> bool:
    return any(each["Alive"] and each["NodeID"] == node for each in ray.nodes())


def _taken_away_in_s(node: str) -> float | None:
    """The seconds until a node that is being drained goes; None for another."""
    deadline_ms = ray_state.state.get_draining_nodes().get(node)
    if deadline_ms is None:
        return None
    return deadline_ms / 1000 - time.time() if deadline_ms else math.inf


@contextmanager
def exit_if_device_lost() -> Generator[None]:
    """End this process when its device is lost: Ray starts another, while an error ends the job."""
    from rayjobs.diffusion.faults import DeviceLost

    try:
        yield
    except DeviceLost:
        logging.getLogger("rayjobs").exception("the device is lost; ending this worker")
        os._exit(1)


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
    max_workers, made = min(workers.max_workers, len(shards)), Activity()
    told: set[int] = set()
    progress = Progress(num_images, "images")
    with progress, progress.watch(workers.max_stall_s):
        rows = blocks.dataset(shards, max_workers).map_batches(
            RayShardWorker,
            fn_constructor_args=(
                config.model_dump(mode="json"),
                lock.model_dump(mode="json"),
                segment,
                uuid.uuid4().hex,
            ),
            fn_constructor_kwargs={
                "redo": redo,
                "progress": progress.counter,
                "report_every_s": report_every_s(max_workers),
            },
            compute=ray.data.ActorPoolStrategy(
                min_size=min(workers.min, max_workers),
                max_size=max_workers,
                max_tasks_in_flight_per_actor=blocks.BLOCKS_HELD,
            ),
            batch_size=1,
            num_cpus=workers.num_cpus,
            num_gpus=workers.num_gpus or None,
        )
        try:
            for entry in rows.iter_rows():
                # Of a block whose worker died, another one tells all again: what it finds finished
                # may be that one's work, and may have been told before.
                entry["made"] = entry["made"] or progress.is_own(entry.get("worker", ""))
                if entry["shard"] in told:
                    continue
                told.add(entry["shard"])
                if entry["made"]:
                    made.add(entry)
                yield entry
            progress.worked_s = made.active_s or None
        except ray.exceptions.RayError as error:
            raise cluster.unwrap_error(error) from None


@contextmanager
def session(workers: Workers) -> Generator[None]:
    """The cluster to run on, as `cluster.session`, with Ray Data set for long jobs."""
    if cluster.is_own():
        check_machine(workers)
    with cluster.session(workers.max_workers * workers.num_cpus):
        await_room(workers, 1, cluster.is_owned())
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.execution_options.verbose_progress = False
        context.execution_no_progress_timeout_s = -1
        context.max_consecutive_actor_init_deaths = MAX_DEATHS_AT_START
        yield


def run_on_worker(config: ResolvedConfig, function: Callable[[ResolvedConfig], T]) -> T:
    """`function(config)` as a task wherever the cluster would place a worker."""
    workers = config.workers
    task = ray.remote(function).options(num_cpus=workers.num_cpus, num_gpus=workers.num_gpus)
    try:
        result: T = ray.get(task.remote(config))
    except ray.exceptions.RayError as error:
        raise cluster.unwrap_error(error) from None
    return result
