"""Generation on two hosts: the same bytes as on one, whatever happens to the hosts and to S3."""

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
from tests.hosts import faults
from tests.hosts.cluster import ONE_A_HOST, Cluster, ended
from tests.hosts.faults import Hosts

pytestmark = [pytest.mark.ray, pytest.mark.slow]

IMAGES, PER_SHARD = 320, 8
AT_SHARD = 4
"""The fault comes once so many shards are made."""


def values(output: str) -> dict[str, Any]:
    return {
        "model": {"uri": "starter"},
        "prompts": {"templates": ["a {colour} star"], "axes": {"colour": ["red", "blue"]}},
        "seeds": {"count": IMAGES // 2},
        "sampler": {"name": "euler_a", "steps": 2, "guidance_scale": 1.0},
        "output": {"uri": output, "images_per_shard": PER_SHARD},
        "engine": {"batch_size": 4},
    }


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The hashes of a run in this process, which nobody disturbed."""
    output = str(tmp_path_factory.mktemp("calm") / "out")
    config = GenerateConfig.model_validate(values(output))
    lock = job.prepare(config)
    list(ShardWorker(config, lock).make(range(lock.num_shards)))
    return [entry["sha256"] for entry in entries(output)]


def entries(uri: str) -> list[dict[str, Any]]:
    return list(Manifest(uri).entries())


@pytest.fixture
def output(bucket: str) -> str:
    return f"{bucket}/out"


def write_config(folder: Path, output: str) -> str:
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(values(output)))
    return str(path)


@pytest.fixture
def config(output: str, tmp_path: Path) -> str:
    return write_config(tmp_path, output)


@pytest.fixture
def is_midway(output: str) -> Callable[[], bool]:
    folder = storage.join(output, "manifest")
    return lambda: len(storage.list_files(folder)) >= AT_SHARD


def check(output: str, expected: list[str]) -> None:
    """Nothing is lost, nothing is there twice, and every byte is as it should be."""
    assert [entry["sha256"] for entry in entries(output)] == expected
    assert main(["verify", output]) == 0
    assert len(storage.list_files(storage.join(output, "data"))) == len(expected)
    for folder in ("tmp", "attempts", "replacing"):
        assert storage.list_files(storage.join(output, folder)) == []


def test_both_hosts_make_what_one_makes(
    cluster: Cluster, config: str, output: str, expected: list[str]
) -> None:
    said = ended(cluster.submit("generate", config, *ONE_A_HOST))
    made = [entry["node"] for entry in entries(output)]
    by_host = {node: made.count(node) for node in sorted(set(made))}
    print(f"\n{said.splitlines()[-1]}; shards by host: {by_host}")
    check(output, expected)
    assert by_host.keys() == {"host-1", "host-2"}


@pytest.mark.parametrize("fault", faults.FAULTS)
def test_a_fault_in_the_middle(
    fault: Callable[[Hosts], None],
    hosts: Hosts,
    config: str,
    output: str,
    expected: list[str],
    is_midway: Callable[[], bool],
) -> None:
    happens = faults.when(is_midway, fault, hosts)
    ended(hosts.cluster.submit("generate", config, *ONE_A_HOST))
    times = [entry["finished_at"] for entry in entries(output)]
    happens.join(60)
    faults.tell(fault.__name__, hosts, times)
    check(output, expected)


def test_the_drivers_host_dies_and_the_same_is_submitted_again(
    hosts: Hosts, config: str, output: str, expected: list[str], is_midway: Callable[[], bool]
) -> None:
    cluster = hosts.cluster
    first = cluster.submit("generate", config, *ONE_A_HOST)
    faults.when(is_midway, lambda _: cluster.network.stop(1), hosts).join(200)
    first.kill()
    first.communicate()
    before = {entry["shard"]: entry for entry in entries(output)}
    assert len(before) < len(expected)
    started = time.time()
    cluster.start()
    print(f"\na new cluster after {time.time() - started:.0f} s; {len(before)} shards are kept")
    ended(cluster.submit("generate", config, *ONE_A_HOST))
    after = {entry["shard"]: entry for entry in entries(output)}
    times = [entry["finished_at"] for entry in after.values()]
    faults.tell("the driver's host killed", hosts, times)
    assert {shard: after[shard] for shard in before} == before
    check(output, expected)
