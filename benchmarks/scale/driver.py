"""The driver of a job, driven by a fake cluster: its memory and processor time for so many shards.

Runs `rayjobs.generation.job.run` whole, on a folder, in a process of its own: lock, manifest, loop,
the page that follows, the report at the end. Workers are a schedule of blocks whose entries arrive
when Ray Data would hand them over, at the end of a block, as fast as the driver takes them. No
shard's data is there: a report reads some thousands of them at most, whatever the data set, and
near-duplicates are searched for in small data sets only.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from typing import Any
from unittest.mock import patch

import numpy as np

from benchmarks.memory import Watch
from benchmarks.scale import figures, schedule
from rayjobs.dataset.lock import Lock
from rayjobs.dataset.manifest import GROUP, Entry, Manifest
from rayjobs.generation.config import GenerateConfig
from rayjobs.generation.spec.plan import LOSSLESS

SHARD_BYTES = int(figures.IMAGES_PER_SHARD * LOSSLESS["png"] * 1024**2)
BEGAN = 1.7e9
"""When the run began, in unix seconds."""


def measure(num_images: int, num_gpus: int) -> dict[str, float]:
    """What the driver takes, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.scale.driver", str(num_images), str(num_gpus)]
        done = subprocess.run([*command, folder], stdout=subprocess.PIPE, check=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def configure(num_images: int, output: str) -> GenerateConfig:
    values: dict[str, Any] = {
        "model": {"uri": "starter"},
        "prompts": {"inline": ["a photo of a red star"]},
        "seeds": {"count": num_images},
        "output": {
            "uri": output,
            "images_per_shard": figures.IMAGES_PER_SHARD,
            "most_images": max(num_images, 1),
        },
    }
    return GenerateConfig.model_validate(values)


def entry(manifest: Manifest, shard: int, rows: int, at: float, worker: int) -> Entry:
    """What a worker tells of a shard that it committed."""
    node = f"ip-10-0-{worker // figures.GPUS_PER_NODE}-1.eu-central-1.compute.internal"
    return {
        "shard": shard,
        "generation": 0,
        "file": f"data/{manifest.format.name(shard)}",
        "sha256": f"{shard * 0x9E3779B97F4A7C15 % 2**64:016x}" * 4,
        "bytes": SHARD_BYTES,
        "rows": rows,
        "failed": 0,
        "seconds": figures.IMAGES_PER_SHARD / figures.IMAGES_PER_S,
        "finished_at": round(BEGAN + at, 3),
        "worker": f"{node}-{1000 + worker}",
        "node": node,
        "class": "0123456789ab",
        "class_changed": False,
        "made": True,
    }


def entries(
    lock: Lock, manifest: Manifest, shards: np.ndarray, num_gpus: int, most_open: list[int]
) -> Iterator[Entry]:
    """What workers tell, block after block; notes how many entries wait for their group at most."""
    open_, left = 0, {}
    for done in schedule.Schedule(len(shards), num_gpus).run():
        shard_s = figures.IMAGES_PER_SHARD / figures.IMAGES_PER_S
        for n in range(done.block.size):
            shard = int(shards[done.block.start + n])
            at = done.at - (done.block.size - 1 - n) * shard_s
            yield entry(manifest, shard, len(lock.records_of(shard) or ()), at, done.worker)
            group = shard // GROUP
            left[group] = left.get(group, min(GROUP, lock.num_shards - group * GROUP)) - 1
            open_ += 1
            if not left[group]:
                open_ -= min(GROUP, lock.num_shards - group * GROUP)
            most_open[0] = max(most_open[0], open_)


def run_here(num_images: int, num_gpus: int, output: str) -> dict[str, float]:
    """The job in this process, with a fake cluster."""
    from rayjobs import cluster
    from rayjobs.generation import job
    from rayjobs.generation.worker import pool

    config, manifest, most_open = configure(num_images, output), Manifest(output), [0]
    started_s: dict[str, float] = {}
    loop: dict[str, float] = {}

    def make(
        config: GenerateConfig, lock: Lock, segment: int, shards: np.ndarray, *_: Any
    ) -> Iterator[Entry]:
        started_s["loop"] = time.process_time()
        yield from entries(lock, manifest, shards, num_gpus, most_open)
        started_s["end"], loop["peak_mb"] = time.process_time(), watch.peak_mb

    with ExitStack() as stack:
        for place, name, fake in (
            (cluster, "is_own", lambda: False),
            (pool, "session", lambda workers: nullcontext()),
            (pool, "run_on_worker", lambda config, function: {"class": "fake"}),
            (pool, "make", make),
            (job, "MAX_DEDUPLICATED", 0),
        ):
            stack.enter_context(patch.object(place, name, fake))
        stack.enter_context(patch("rayjobs.room.check_shared", lambda uri: None))
        watch, began_s, began = Watch(), time.process_time(), time.monotonic()
        summary = job.run(config)
    assert summary.num_made == num_images
    return {
        "images": num_images,
        "gpus": num_gpus,
        "shards": -(-num_images // figures.IMAGES_PER_SHARD),
        "before_mb": watch.start_mb,
        "loop_peak_mb": loop["peak_mb"],
        "peak_mb": watch.peak_mb,
        "start_cpu_s": started_s["loop"] - began_s,
        "loop_cpu_s": started_s["end"] - started_s["loop"],
        "report_cpu_s": time.process_time() - started_s["end"],
        "seconds": time.monotonic() - began,
        "most_open": most_open[0],
    }


if __name__ == "__main__":
    print(json.dumps(run_here(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])))
