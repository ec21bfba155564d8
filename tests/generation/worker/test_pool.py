"""The pool of workers: it grows to the work and shrinks when the work ends."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.util.state import list_actors

from rayjobs.generation import job
from rayjobs.generation.config import GenerateConfig
from rayjobs.generation.tools.verify import verify

# Ray Data 2.60 reads its own deprecated switches.
pytestmark = pytest.mark.ray


def config(folder: Path, rows: list[str], workers: dict[str, float]) -> GenerateConfig:
    (folder / "prompts.csv").write_text("\n".join(["prompt,steps", *rows]))
    values = {
        "model": {"uri": "starter"},
        "prompts": {"uri": str(folder / "prompts.csv")},
        "sampler": {"name": "euler"},
        "output": {"uri": str(folder / "out"), "images_per_shard": 4},
        "engine": {"batch_size": 4},
        "workers": workers,
    }
    return GenerateConfig.model_validate(values)


class Census:
    """How many workers were alive, looked at every second until `close`."""

    def __init__(self, dashboard: str) -> None:
        self.alive: list[int] = []
        self._address = f"http://{dashboard}"
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._over.wait(1):
            actors = list_actors(address=self._address, filters=[("state", "=", "ALIVE")])
            self.alive.append(sum("ShardWorker" in actor.class_name for actor in actors))

    def close(self) -> list[int]:
        self._over.set()
        self._thread.join(10)
        return self.alive


@pytest.fixture
def census(no_ray_cluster: None) -> Iterator[Census]:
    context = ray.init(num_cpus=4, include_dashboard=True, log_to_driver=False)
    yield Census(context.dashboard_url)
    ray.shutdown()


@pytest.mark.slow
def test_workers_come_with_the_work_and_go_with_it(census: Census, tmp_path: Path) -> None:
    # One shard takes longer than all others: at the end two of three workers have nothing to do.
    rows = ["a red star,60"] * 80 + ["a blue star,1000"] * 4
    summary = job.run(config(tmp_path, rows, {"min": 1, "max": 3}))
    alive = census.close()
    assert (summary.num_made, summary.num_failed) == (84, 0)
    assert max(alive) == 3, alive
    last = len(alive) - alive[::-1].index(3)
    assert 1 in alive[:last], alive
    assert 1 in alive[last:], alive
    assert verify(str(tmp_path / "out")).faults == []
