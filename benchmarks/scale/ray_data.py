"""What Ray Data takes of the driver for each block of shards: real Ray, workers that make nothing.

Two sizes, each in a process of its own: what the larger takes more is the blocks'.
"""

import json
import subprocess
import sys
import time

SIZES = (2_000, 40_000)
"""Shards, planned for as many workers as make them many blocks: of the first ones Ray keeps more."""
PLANNED_FOR = 256


class Nothing:
    """A worker whose shards are done at once."""

    def __call__(self, batch):  # type: ignore[no-untyped-def]
        import numpy as np

        for numbers in batch["shards"]:
            for number in numbers:
                yield {"shard": np.array([int(number)])}


def measure() -> dict[str, float]:
    few, many = map(_alone, SIZES)
    more = many["blocks"] - few["blocks"]
    return {
        "blocks": many["blocks"],
        "cpu_ms_per_block": 1e3 * (many["cpu_s"] - few["cpu_s"]) / more,
        "bytes_per_block": 1e6 * (many["mb"] - few["mb"]) / more,
        "first_entry_s": many["first_s"],
        "cut_cpu_s": many["cut_cpu_s"],
    }


def _alone(num_shards: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.scale.ray_data", str(num_shards)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def run_here(num_shards: int) -> dict[str, float]:
    import numpy as np
    import ray
    import ray.data

    from benchmarks.memory import Watch
    from rayjobs.generation.worker import blocks

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    watch, cpu_s, began, first_s, found = Watch(), time.process_time(), time.monotonic(), 0.0, 0
    dataset = blocks.dataset(np.arange(num_shards), PLANNED_FOR)
    cut_cpu_s = time.process_time() - cpu_s
    strategy = ray.data.ActorPoolStrategy(min_size=1, max_size=1)
    for _ in dataset.map_batches(Nothing, batch_size=1, compute=strategy, num_cpus=1).iter_rows():
        first_s = first_s or time.monotonic() - began
        found += 1
    assert found == num_shards
    return {
        "blocks": sum(1 for _ in blocks.spans(num_shards, PLANNED_FOR)),
        "cpu_s": time.process_time() - cpu_s,
        "mb": watch.peak_mb - watch.start_mb,
        "first_s": first_s,
        "cut_cpu_s": cut_cpu_s,
    }


if __name__ == "__main__":
    print(json.dumps(run_here(int(sys.argv[1]))))
