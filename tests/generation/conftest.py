from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest

from rayjobs import cluster
from rayjobs.generation.worker import pool
from rayjobs.generation.worker.shards import ShardWorker


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs whose one worker is this process: for tests of what goes on around the pool."""

    def make(
        config: Any, lock: Any, segment: int, shards: Any, redo: Any, num_images: int
    ) -> Iterator[Any]:
        return ShardWorker(config, lock, segment, redo=redo).make(map(int, shards))

    monkeypatch.setattr(cluster, "is_own", lambda: True)
    monkeypatch.setattr(pool, "session", lambda workers: nullcontext())
    monkeypatch.setattr(pool, "make", make)
