"""Half an hour of generation on two hosts in which something dies every minute.

The bytes are those of a run that nobody disturbed; the same command is given again where its driver
was lost.
"""

import contextlib
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayjobs import storage
from rayjobs.cli import main
from rayjobs.dataset.manifest import Manifest
from rayjobs.generation import job
from rayjobs.generation.config import GenerateConfig
from rayjobs.generation.worker.shards import ShardWorker
from tests.hosts.cluster import ONE_A_HOST, Cluster
from tests.hosts.faults import Hosts
from tests.hosts.test_generate import values

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SOAK_S = float(os.environ.get("RAYJOBS_TESTS_SOAK_S", "1800"))
EVERY_S = 60.0
AWAY_S = 15.0
IMAGES_PER_S = 1.0
"""About as many as two hosts on two cores make of so many steps, with what the faults cost."""
STEPS = 12
LONGEST = 4.0
"""The job may take so many times as long."""


def kill_a_worker(hosts: Hosts) -> None:
    """One on each host: what Ray calls the process of a worker begins so."""
    for number in (1, 2):
        with contextlib.suppress(AssertionError):  # none works there at this moment
            hosts.cluster.network.kill(number, "ray::MapWorker(")


def kill_the_node(hosts: Hosts) -> None:
    hosts.cluster.network.stop(2)
    hosts.cluster.await_death()
    hosts.cluster.bring_back(2)


def cut_the_link(hosts: Hosts) -> None:
    hosts.cluster.network.cut(2)
    time.sleep(AWAY_S)
    hosts.cluster.network.heal(2)


def take_storage_away(hosts: Hosts) -> None:
    hosts.proxy.go_away()
    time.sleep(AWAY_S)
    hosts.proxy.come_back()


def kill_the_driver(hosts: Hosts) -> None:
    """The head, and the driver that runs there."""
    hosts.cluster.start()


FAULTS: tuple[Callable[[Hosts], None], ...] = (
    kill_a_worker,
    kill_the_node,
    cut_the_link,
    take_storage_away,
    kill_the_driver,
)


@pytest.fixture
def config(bucket: str, tmp_path: Path) -> dict[str, Any]:
    images = 2 * max(8, round(SOAK_S * IMAGES_PER_S / 2))
    sampler = {"name": "euler_a", "steps": STEPS, "guidance_scale": 3.0}
    changed = {"seeds": {"count": images // 2}, "sampler": sampler}
    return values(f"{bucket}/out") | changed


def test_something_dies_every_minute(hosts: Hosts, config: dict[str, Any], tmp_path: Path) -> None:
    path, output = tmp_path / "job.yaml", config["output"]["uri"]
    path.write_text(yaml.safe_dump(config))
    rng, count, started = random.Random(0), 0, time.time()
    follower, next_s = submit(hosts.cluster, path), started + EVERY_S
    while (code := follower.poll()) != 0 and time.time() < started + LONGEST * SOAK_S:
        if code is not None:
            follower = submit(hosts.cluster, path)
        if time.time() > next_s:
            fault = rng.choice(FAULTS)
            print(f"\n{time.time() - started:5.0f} s, {made(output):4} shards: {fault.__name__}")
            fault(hosts)
            count, next_s = count + 1, max(next_s + EVERY_S, time.time() + EVERY_S / 4)
        time.sleep(2)
    assert code == 0
    print(f"\n{count} faults in {time.time() - started:.0f} s")
    check(output, config, tmp_path)


def submit(cluster: Cluster, path: Path) -> Any:
    """The job's follower; what it says is read, so that it never waits for a reader."""
    follower = cluster.submit("generate", str(path), *ONE_A_HOST)
    threading.Thread(target=follower.communicate, daemon=True).start()
    return follower


def made(output: str) -> int:
    return int(Manifest(output).committed(10_000).sum())


def check(output: str, config: dict[str, Any], folder: Path) -> None:
    calm = GenerateConfig.model_validate(
        config | {"output": config["output"] | {"uri": str(folder / "calm")}}
    )
    lock = job.prepare(calm)
    list(ShardWorker(calm, lock).make(range(lock.num_shards)))
    found, expected = (
        [(entry["sha256"], entry["failed"]) for entry in Manifest(uri).entries()]
        for uri in (output, str(folder / "calm"))
    )
    assert found == expected
    assert main(["verify", output]) == 0
    assert len(storage.list_files(storage.join(output, "data"))) == len(expected)
