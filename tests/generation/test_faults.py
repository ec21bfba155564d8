"""Processes that die: workers, nodes, drivers. The data set does not notice."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from rayjobs import storage
from rayjobs.cli import main
from rayjobs.dataset.manifest import Manifest
from rayjobs.generation import job
from rayjobs.generation.config import GenerateConfig
from rayjobs.generation.tools.verify import verify
from rayjobs.generation.worker.shards import ShardWorker
from tests.generation.jobs import values, write_job
from tests.servers import Ceph

pytestmark = pytest.mark.model

ROOT = Path(__file__).parents[2]


def hashes(uri: str) -> list[str]:
    return [entry["sha256"] for entry in Manifest(uri).entries()]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[str]]:
    """The hashes of so many images of a run that nobody disturbed: no Ray, shards backwards."""

    @cache
    def calm(images: int) -> list[str]:
        output = str(tmp_path_factory.mktemp("calm") / "out")
        config = GenerateConfig.model_validate(values(output, images))
        lock = job.prepare(config)
        list(ShardWorker(config, lock).make(range(lock.num_shards)[::-1]))
        return hashes(output)

    return calm


FOLDER = pytest.param("folder", marks=pytest.mark.slow)
CEPH = pytest.param("ceph", marks=pytest.mark.slow)


@pytest.fixture
def output(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URI of a data set on the storage that the test's parameter names."""
    places = {"moto": "bucket", "ceph": "ceph_bucket"}
    if request.param == "folder":
        return str(tmp_path / "out")
    return storage.join(request.getfixturevalue(places[request.param]), "out")


@pytest.fixture
def cluster(output: str, no_ray_cluster: None) -> Iterator[Cluster]:
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    made.add_node(num_cpus=2)
    ray.init(address=made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


def check(output: str, expected: list[str], images: int) -> None:
    assert hashes(output) == expected
    found = verify(output)
    assert (found.num_records, found.faults) == (images, [])
    assert len(storage.list_files(storage.join(output, "data"))) == len(expected)
    for folder in ("tmp", "attempts", "replacing"):
        assert storage.list_files(storage.join(output, folder)) == []


def after(output: str, shards: int, act: Callable[[], None]) -> threading.Thread:
    """A thread that acts once so many shards are finished."""

    def watch() -> None:
        folder = storage.join(output, "manifest")
        while len(storage.list_files(folder)) < shards:
            time.sleep(0.1)
        act()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def kill_a_worker(output: str) -> None:
    entry = next(Manifest(output).entries())
    os.kill(int(entry["worker"].rsplit("-", 1)[1]), signal.SIGKILL)


def take_away(server: Ceph, seconds: float) -> None:
    server.stop()
    time.sleep(seconds)
    server.start()


@pytest.mark.ray
@pytest.mark.parametrize("output", [FOLDER, CEPH], indirect=True)
def test_a_worker_and_a_node_die(
    output: str,
    cluster: Cluster,
    expected: Callable[[int], list[str]],
    request: pytest.FixtureRequest,
) -> None:
    node = cluster.add_node(num_cpus=2)
    faults = [
        after(output, 4, lambda: kill_a_worker(output)),
        after(output, 14, lambda: cluster.remove_node(node, allow_graceful=False)),
    ]
    if "ceph_server" in request.fixturenames:
        server = request.getfixturevalue("ceph_server")
        faults.append(after(output, 20, lambda: take_away(server, 5)))
    summary = job.run(GenerateConfig.model_validate(values(output, 256, workers=3)))
    for fault in faults:
        fault.join(20)
        assert not fault.is_alive()
    assert (summary.num_made, summary.num_failed) == (256, 0)
    check(output, expected(256), 256)


@pytest.mark.ray
@pytest.mark.parametrize("output", [FOLDER, "moto"], indirect=True)
def test_the_driver_dies_and_is_started_again(
    output: str, tmp_path: Path, expected: Callable[[int], list[str]], joining: dict[str, str]
) -> None:
    """On what the shared cluster's workers know."""
    command = write_job(tmp_path, values(output, 32))
    kill_driver(command, joining, output, 1)
    assert main(command) == 0
    check(output, expected(32), 32)


@pytest.mark.ray
@pytest.mark.slow
def test_a_driver_that_dies_again_and_again_in_one_shard_blames_no_record(
    tmp_path: Path, joining: dict[str, str]
) -> None:
    sampler = {"sampler": {"name": "euler_a", "steps": 20, "guidance_scale": 1.0}}
    output, calm = str(tmp_path / "out"), str(tmp_path / "calm")
    config = GenerateConfig.model_validate(values(calm, 8) | sampler)
    list(ShardWorker(config, job.prepare(config)).make([0]))
    command = write_job(tmp_path, values(output, 8) | sampler)
    marker = Path(output, "attempts", "00000000.json")

    def run() -> str | None:
        """Whose worker makes the shard."""
        return json.loads(marker.read_text())["run"] if marker.exists() else None

    seen = {None}
    for _ in range(3):
        with subprocess.Popen(
            [sys.executable, "-m", "rayjobs", *command],
            cwd=ROOT,
            env=os.environ | joining,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as driver:
            while run() in seen:
                assert driver.poll() is None
                time.sleep(0.05)
            seen.add(run())
            driver.kill()
    assert len(hashes(output)) == 0
    assert main(command) == 0
    check(output, hashes(calm), 8)


@pytest.mark.ray
def test_an_interruption_leaves_what_is_finished(
    tmp_path: Path, ray_cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "out")
    command = write_job(tmp_path, values(output, 64))
    handler = signal.getsignal(signal.SIGTERM)
    after(output, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    try:
        assert main(command) == 130
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert "continues where this stopped" in capsys.readouterr().err
    assert 0 < verify(output).num_records < 64
    assert verify(output).faults == []
    assert storage.list_files(storage.join(output, "attempts")) == []


def kill_driver(command: list[str], variables: dict[str, str], output: str, shards: int) -> None:
    """Run a command in a process that is killed once so many shards are finished."""
    arguments = [sys.executable, "-m", "rayjobs", *command]
    nowhere = subprocess.DEVNULL
    with subprocess.Popen(
        arguments, cwd=ROOT, env=os.environ | variables, stdout=nowhere, stderr=nowhere
    ) as driver:
        after(output, shards, driver.kill).join(120)
        assert driver.wait(60) == -signal.SIGKILL


def test_a_replacement_cut_off_is_finished_or_forgotten(tmp_path: Path) -> None:
    manifest = Manifest(str(tmp_path / "out"))
    facts = {"rows": 1, "failed": 1, "seconds": 1.0}
    name = manifest.format.name(0)
    old = manifest.commit(0, {name: b"old"}, facts)
    install, manifest._install = manifest._install, lambda *_: 1 / 0  # type: ignore[assignment]
    with pytest.raises(ZeroDivisionError):
        manifest.replace(old, {name: b"new"}, facts)
    manifest._install = install  # type: ignore[method-assign]
    manifest.recover()
    assert manifest.entry(0) == {**old, "generation": 1, "sha256": manifest.sha256(0)}

    overwrite, manifest._overwrite = manifest._overwrite, lambda *_: 1 / 0  # type: ignore
    with pytest.raises(ZeroDivisionError):
        manifest.replace(manifest.entry(0) or {}, {name: b"newer"}, facts)
    manifest._overwrite = overwrite  # type: ignore[method-assign]
    manifest.recover()
    assert (manifest.entry(0) or {})["sha256"] == manifest.sha256(0)


def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = str(tmp_path / "out")
    config = GenerateConfig.model_validate(values(output, 16))
    lock = job.prepare(config)
    list(ShardWorker(config, lock).make(range(2)))
    assert main(["verify", output, "--regenerate", "3"]) == 0
    shard = Path(output) / "data" / "shard-00000001.parquet"
    data = bytearray(shard.read_bytes())
    data[3000] ^= 1
    shard.write_bytes(data)
    assert main(["verify", output]) == 3
    out = capsys.readouterr().out
    assert "shard 1" in out
    assert "record" in out
