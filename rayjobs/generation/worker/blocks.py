"""Blocks of shards, each of which one call of a worker makes.

Owns their sizes, and their way to the pool: one small task cuts them while workers start, so that
the driver neither makes nor stores thousands of objects before. Knows nothing of workers.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data.block import BlockMetadata

MAX_SHARDS_PER_BLOCK = 128
BLOCKS_AHEAD = 3
"""The rest of the shards is that many blocks for each worker, if it is small enough."""
BLOCKS_HELD = 2
"""What Ray Data hands to one worker at once: one that it makes, one that waits there. Together less
than its share, since those who wait with one worker cannot go to another. Ray Data asks for more
workers where each has its two."""


def spans(num_shards: int, workers: int) -> Iterator[tuple[int, int]]:
    """Where each block starts, and how many shards it has: many each, fewer towards the end.

    Large blocks keep a worker's batch full and Ray's bookkeeping short; small ones at the end let
    all workers finish together.
    """
    at = 0
    while at < num_shards:
        share = (num_shards - at) // (BLOCKS_AHEAD * workers)
        size = min(MAX_SHARDS_PER_BLOCK, max(1, share))
        yield at, size
        at += size


def dataset(shards: np.ndarray, workers: int) -> ray.data.Dataset:
    """One row a block, one block a task."""
    source = _Shards(shards, workers)
    # A row for each block asked for, so that Ray cuts the one table of the one task into rows.
    return ray.data.read_datasource(source, override_num_blocks=source.num_blocks, num_cpus=0)


class _Shards(ray.data.Datasource):
    def __init__(self, shards: np.ndarray, workers: int):
        super().__init__()
        self._shards, self._workers = ray.put(shards), workers
        self._num_shards = len(shards)
        self.num_blocks = sum(1 for _ in spans(len(shards), workers))

    def estimate_inmemory_data_size(self) -> int:
        return 8 * self._num_shards

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ray.data.ReadTask]:
        shards, workers = self._shards, self._workers

        def read() -> Iterator[pa.Table]:
            numbers = ray.get(shards)
            starts = [start for start, _ in spans(len(numbers), workers)]
            offsets = pa.array([*starts, len(numbers)], pa.int32())
            lists = pa.ListArray.from_arrays(offsets, pa.array(numbers, pa.int64()))
            yield pa.table({"shards": lists})

        facts = BlockMetadata(
            num_rows=self.num_blocks, size_bytes=None, input_files=None, exec_stats=None
        )
        return [ray.data.ReadTask(read, facts)]
