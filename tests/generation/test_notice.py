"""A machine that will be taken away: its workers end in good order, and the job goes on."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from rayjobs.cli import main
from rayjobs.generation import job
from rayjobs.generation.config import GenerateConfig
from rayjobs.generation.worker import notice
from rayjobs.generation.worker.notice import Notice
from rayjobs.generation.worker.shards import ShardWorker
from tests.draining import drain
from tests.generation.jobs import values, write_job
from tests.generation.test_faults import after, check, expected

__all__ = ["expected"]
ROOT = Path(__file__).parents[2]


@pytest.mark.model
def test_a_worker_with_notice_begins_no_shard_and_drops_what_is_open(tmp_path: Path) -> None:
    config = GenerateConfig.model_validate(values(str(tmp_path / "out"), 32))
    worker = ShardWorker(config, job.prepare(config))
    begun: list[int] = []
    worker.takes_more = lambda: len(begun) < 2 and not begun.append(len(begun))  # type: ignore
    assert [entry["shard"] for entry in worker.make(range(4))] == [0, 1]
    worker._begin(3)
    worker.attempts.begin(3, None)
    worker.drop()
    assert not list((tmp_path / "out" / "attempts").glob("*"))


@pytest.mark.parametrize("left_s", [float("inf"), notice.MARGIN_S])
def test_a_process_ends_when_it_is_done_or_in_time(
    monkeypatch: pytest.MonkeyPatch, left_s: float
) -> None:
    did: list[str] = []
    monkeypatch.setattr(notice, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(os, "_exit", lambda code: did.append(f"exit {code}"))
    found = [left_s, None, None]
    mine = Notice(lambda: found.pop(), lambda: did.append("drop"))
    mine.leave()
    assert not did or not found
    while not mine.is_given():
        time.sleep(0.01)
    if left_s == float("inf"):
        mine.leave()
    while len(did) < 2:
        time.sleep(0.01)
    assert did[:2] == ["drop", "exit 1"]


@pytest.mark.ray
@pytest.mark.slow
def test_a_node_is_drained(
    tmp_path: Path, no_ray_cluster: None, expected: Callable[[int], list[str]]
) -> None:
    output = str(tmp_path / "out")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    node = cluster.add_node(num_cpus=2)
    ray.init(address=cluster.address, log_to_driver=False)
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    left: list[bool] = []

    def take_away() -> None:
        drain(cluster.address, node, 60)
        while any("RayShardWorker" in name_of(each) for each in raylet.children()):
            time.sleep(0.2)
        left.append(True)

    try:
        thread = after(output, 3, take_away)
        summary = job.run(GenerateConfig.model_validate(values(output, 512, workers=3)))
        thread.join(60)
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert left
    assert summary.num_failed == 0
    check(output, expected(512), 512)


def name_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.mark.ray
@pytest.mark.slow
def test_a_job_that_hangs_names_the_shard_and_ends(
    tmp_path: Path, expected: Callable[[int], list[str]]
) -> None:
    output = str(tmp_path / "out")
    command = write_job(tmp_path, values(output, 512))
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    with subprocess.Popen(
        [sys.executable, "-m", "rayjobs", *command, "workers.max_stall_s=15"],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    ) as driver:
        stopped: list[int] = []

        def stop() -> None:
            for each in psutil.Process(driver.pid).children(recursive=True):
                if "RayShardWorker" in name_of(each):
                    each.send_signal(signal.SIGSTOP)
                    stopped.append(each.pid)

        after(output, 2, stop)
        _, said = driver.communicate(timeout=240)
    assert stopped
    assert driver.returncode == 1, said
    assert any(f"-{pid} at shard" in said for pid in stopped), said
    assert "workers.max_stall_s is 15 s" in said
    assert main([*command, "workers.max_stall_s=null"]) == 0
    check(output, expected(512), 512)
