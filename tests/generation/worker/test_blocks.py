"""Blocks of shards: every shard once, large ones first, none that hoards."""

from itertools import islice

import pytest

from rayjobs.generation.worker.blocks import BLOCKS_HELD, MAX_SHARDS_PER_BLOCK, spans

SIZES = [(1, 1), (5, 8), (40, 2), (41, 2), (1000, 8), (100_000, 1024)]


@pytest.mark.parametrize(("shards", "workers"), SIZES)
def test_blocks_hold_every_shard_once(shards: int, workers: int) -> None:
    found = [n for start, size in spans(shards, workers) for n in range(start, start + size)]
    assert found == list(range(shards))
    sizes = [size for _, size in spans(shards, workers)]
    assert sizes == sorted(sizes, reverse=True)
    assert 1 <= sizes[-1] <= sizes[0] <= MAX_SHARDS_PER_BLOCK


@pytest.mark.parametrize(("shards", "workers"), SIZES)
def test_the_first_worker_to_come_holds_no_more_than_its_share(shards: int, workers: int) -> None:
    held = sum(size for _, size in islice(spans(shards, workers), BLOCKS_HELD))
    assert held <= max(BLOCKS_HELD, shards / workers)
