"""What Ray Data takes of the driver for each block of shards: real Ray, and a worker without work.

In a process of its own. Counted from a tenth of the blocks on, so that no start counts.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

NUM_SHARDS, PLANNED_FOR = 40_000, 256
"""Planned for as many workers as make them some thousands of blocks."""


class Nothing:
    """A worker whose shards are done at once; it tells the first of each block."""

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
        import numpy as np

        for numbers in batch["shards"]:
            yield {"shard": np.array([int(numbers[0])])}


def measure() -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.scale.ray_data"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def run_here() -> dict[str, float]:
    import numpy as np
    import ray
    import ray.data

    from benchmarks.memory import resident_mb
    from rayjobs.generation.worker import blocks

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    began_cpu_s = time.process_time()
    dataset = blocks.dataset(np.arange(NUM_SHARDS), PLANNED_FOR)
    cut_cpu_s = time.process_time() - began_cpu_s
    num_blocks = sum(1 for _ in blocks.spans(NUM_SHARDS, PLANNED_FOR))
    strategy = ray.data.ActorPoolStrategy(min_size=1, max_size=1)
    done = dataset.map_batches(Nothing, batch_size=1, compute=strategy, num_cpus=1)
    marks = []
    for number, _ in enumerate(done.iter_rows(), 1):
        if number in (num_blocks // 10, num_blocks):
            marks.append((number, time.process_time(), resident_mb()))
    (first, first_s, first_mb), (last, last_s, last_mb) = marks
    return {
        "blocks": num_blocks,
        "cut_cpu_s": cut_cpu_s,
        "cpu_ms_per_block": 1e3 * (last_s - first_s) / (last - first),
        "bytes_per_block": 1e6 * (last_mb - first_mb) / (last - first),
    }


if __name__ == "__main__":
    print(json.dumps(run_here()))
