"""Training on two hosts: the same losses as on one, whatever happens to the hosts and to S3."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayjobs import storage
from rayjobs.dreambooth.checkpoints import Checkpoints
from rayjobs.models import exports
from tests.hosts import faults
from tests.hosts.cluster import ONE_A_HOST, Cluster, ended
from tests.hosts.faults import Hosts
from tests.servers import environment, new_bucket

pytestmark = [pytest.mark.ray, pytest.mark.slow]

STEPS, EVERY = 120, 5
AT_STEP = 20
"""The fault comes once there is a checkpoint of this step."""
ONE_OR_TWO = ("workers.min=1", "workers.max=2", "workers.num_cpus=1.9")
"""One on each host, and one alone where a host is lost."""


def write_config(folder: Path, output: str) -> str:
    values = {
        "model": {"uri": "starter"},
        "instance": {"uri": "configs/demo/subject", "prompt": "a photo of a sks star"},
        "prior": {"mode": "none"},
        "train": {"steps": STEPS, "global_batch_size": 4, "learning_rate": 1e-4},
        "lora": {"rank": 4, "dropout": 0.2},
        "checkpoint": {"every_n_steps": EVERY, "keep": 100},
        "run": {"name": "hosts"},
        "output": {"uri": output},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


@pytest.fixture(scope="module")
def expected(
    started: Cluster, s3_server: str, tmp_path_factory: pytest.TempPathFactory
) -> list[float]:
    """The losses of one worker on one host, which nobody disturbed."""
    started.make_whole()
    with environment(s3_server):
        storage.forget_connections()
        output = f"{new_bucket()}/run"
        config = write_config(tmp_path_factory.mktemp("calm"), output)
        ended(started.submit("dreambooth", config, "workers.min=1", "workers.num_cpus=1.9"))
        found = losses(output)
    storage.forget_connections()
    return found


def losses(output: str) -> list[float]:
    lines = storage.read_bytes(storage.join(output, "metrics.jsonl")).decode().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


def checkpoints(output: str) -> Checkpoints:
    return Checkpoints(storage.join(output, "checkpoints"))


@pytest.fixture
def output(bucket: str) -> str:
    return f"{bucket}/run"


@pytest.fixture
def config(output: str, tmp_path: Path) -> str:
    return write_config(tmp_path, output)


class Watch:
    """When each checkpoint was first seen."""

    def __init__(self, output: str) -> None:
        self.output = output
        self.seen: dict[str, float] = {}

    def is_midway(self) -> bool:
        """Whether the fault may come; later calls only look."""
        folder = storage.join(self.output, "checkpoints")
        for name in storage.list_files(folder):
            if name.endswith(".json") and "/" not in name:
                self.seen.setdefault(name, time.time())
        return f"step-{AT_STEP:08d}.json" in self.seen

    def follow(self, job: Any) -> str:
        """All that a job said, once it has ended well."""
        while job.poll() is None:
            self.is_midway()
            time.sleep(0.3)
        self.is_midway()
        return ended(job)


def check(output: str, expected: list[float]) -> None:
    assert losses(output) == pytest.approx(expected, abs=1e-5)
    there = checkpoints(output)
    assert [each.step for each in there.list()] == list(range(EVERY, STEPS + 1, EVERY))
    assert all(there.is_whole(each) for each in there.list())
    assert storage.exists(storage.join(output, "export", exports.FILE))


def test_both_hosts_train_as_one_does(
    cluster: Cluster, config: str, output: str, expected: list[float]
) -> None:
    watch = Watch(output)
    said = watch.follow(cluster.submit("dreambooth", config, *ONE_A_HOST))
    check(output, expected)
    worst = max(abs(a - b) for a, b in zip(losses(output), expected, strict=True))
    print(f"\n{said.splitlines()[-1]}; losses differ by {worst:.1e} at most")
    assert {each.facts["workers"] for each in checkpoints(output).list()} == {2}


@pytest.mark.parametrize("fault", faults.FAULTS)
def test_a_fault_in_the_middle(
    fault: Callable[[Hosts], None], hosts: Hosts, config: str, output: str, expected: list[float]
) -> None:
    watch = Watch(output)
    happens = faults.when(watch.is_midway, fault, hosts)
    watch.follow(hosts.cluster.submit("dreambooth", config, *ONE_OR_TWO))
    happens.join(60)
    times = watch.seen.values()
    faults.tell(fault.__name__, hosts, times)
    check(output, expected)


def test_the_drivers_host_dies_and_the_same_is_submitted_again(
    hosts: Hosts, config: str, output: str, expected: list[float]
) -> None:
    cluster, watch = hosts.cluster, Watch(output)
    first = cluster.submit("dreambooth", config, *ONE_OR_TWO)
    faults.when(watch.is_midway, lambda _: cluster.network.stop(1), hosts).join(300)
    first.kill()
    first.communicate()
    kept = checkpoints(output).list()[-1].step
    assert kept < STEPS
    started = time.time()
    cluster.start()
    print(f"\na new cluster after {time.time() - started:.0f} s; {kept} steps are kept")
    watch.follow(cluster.submit("dreambooth", config, *ONE_OR_TWO))
    times = watch.seen.values()
    faults.tell("the driver's host killed", hosts, times)
    check(output, expected)
