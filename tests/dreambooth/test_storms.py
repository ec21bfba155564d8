"""Runs on S3, on a cluster that grows and shrinks, and sharded: killed, cut, and gone on with."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import StableDiffusionXLPipeline
from ray.cluster_utils import Cluster
from safetensors.torch import load

from rayjobs import storage
from rayjobs.dreambooth import composition, job
from rayjobs.dreambooth.checkpoints import Checkpoints
from rayjobs.dreambooth.config import DreamBoothConfig
from rayjobs.dreambooth.resolved import resolve
from rayjobs.models import exports
from tests.draining import drain

# Ray Train's own; Lightning reads deprecated parts of torch.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]
ROOT = Path(__file__).parents[2]
SUBJECT = ROOT / "configs" / "demo" / "subject"
LORA = {"steps": 30, "global_batch_size": 4, "learning_rate": 1e-3}
LONG = LORA | {"steps": 400, "learning_rate": 1e-4}
FULL = {"steps": 24, "global_batch_size": 4, "learning_rate": 1e-4, "method": "full"}


@pytest.fixture(scope="module")
def priors(tmp_path_factory: pytest.TempPathFactory, picture: Callable[[int], Any]) -> Path:
    """Class pictures of the user's own."""
    folder = tmp_path_factory.mktemp("priors")
    for number in range(6):
        picture(number).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def output(request: pytest.FixtureRequest) -> str:
    """A run's folder in the bucket that the test's parameter names."""
    return storage.join(request.getfixturevalue(request.param), "runs", "out")


def values(
    output: str, priors: Path, train: dict[str, Any], every: int = 3, keep: int = 2, **workers: Any
) -> dict[str, Any]:
    return {
        "model": {"uri": "starter"},
        "instance": {"uri": str(SUBJECT), "prompt": "a photo of a sks star"},
        "prior": {"prompt": "a photo of a star", "num_images": 6, "uri": str(priors)},
        "train": train,
        "lora": {"rank": 4, "dropout": 0.2},
        "checkpoint": {"every_n_steps": every, "keep": keep},
        "workers": {"min": 1} | workers,
        "run": {"name": "test"},
        "output": {"uri": output},
    }


def run(settings: dict[str, Any]) -> None:
    """In this process, on a Ray session of its own unless there is one."""
    run = resolve(DreamBoothConfig.model_validate(settings))
    job.run(composition.with_class_images(run))


def start(folder: Path, settings: dict[str, Any]) -> subprocess.Popen[bytes]:
    """The command for this run, in a process and a Ray session of its own."""
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "rayjobs", "dreambooth", str(file)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(folder: Path, settings: dict[str, Any]) -> None:
    with start(folder, settings) as process:
        said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said.decode()


def cut_off(folder: Path, settings: dict[str, Any], step: int) -> None:
    """Kill the command once a checkpoint of `step` or later is there, and its workers with it."""
    with start(folder, settings) as process:
        try:
            wait_for(settings["output"]["uri"], step)
            workers = train_workers(process.pid)
        finally:
            process.kill()
            process.communicate()
    for worker in workers:  # without a driver they live on for seconds
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)
    assert checkpoints(settings["output"]["uri"]).list()[-1].step < settings["train"]["steps"]


def wait_for(output: str, step: int, workers: int | None = None) -> None:
    """Until there is a checkpoint of `step` or later, made by so many workers."""
    deadline = time.monotonic() + 180
    while not any(
        each.step >= step and workers in (None, each.facts["workers"])
        for each in checkpoints(output).list()
    ):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def train_workers(pid: int) -> list[int]:
    """Ray Train's workers among the processes that `pid` started, and those that they started."""
    asked = ["ps", "-eo", "pid=,ppid=,args="]
    lines = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()
    rows = [(int(child), int(parent), args) for child, parent, args in map(_split, lines)]
    family = {pid}
    while more := {child for child, parent, _ in rows if parent in family} - family:
        family |= more
    return [child for child, _, args in rows if child in family and "RayTrainWorker" in args]


def _split(line: str) -> list[str]:
    return line.split(None, 2)


def checkpoints(output: str) -> Checkpoints:
    return Checkpoints(storage.join(output, "checkpoints"))


def check_kept(output: str, steps: list[int]) -> None:
    """These checkpoints, each whole, and nothing else beside them."""
    there = checkpoints(output)
    assert [each.step for each in there.list()] == steps
    for each in there.list():
        folder = there.fetch(each)
        assert folder is not None, each.step
        shutil.rmtree(folder)
    names = {name.split("/")[0].removesuffix(".json") for name in storage.list_files(there.uri)}
    assert names == {f"step-{step:08d}" for step in steps}


def losses(output: str) -> list[float]:
    lines = storage.read_bytes(storage.join(output, "metrics.jsonl")).decode().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


def adapter(output: str) -> dict[str, torch.Tensor]:
    return load(storage.read_bytes(storage.join(output, "export", exports.LORA_FILE)))


@pytest.fixture(scope="module")
def calm(priors: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run in a local folder that nobody disturbed."""
    output = str(tmp_path_factory.mktemp("calm") / "out")
    run(values(output, priors, LORA))
    assert len(losses(output)) == LORA["steps"]
    return output


def check_same(output: str, calm: str) -> None:
    assert losses(output) == losses(calm)
    ours, theirs = adapter(output), adapter(calm)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("output", ["bucket", "ceph_bucket"], indirect=True)
def test_a_worker_dies_on_s3(calm: str, priors: Path, output: str) -> None:
    killed: list[int] = []

    def kill() -> None:
        wait_for(output, 9)
        killed.extend(train_workers(os.getpid()))
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    run(values(output, priors, LORA))
    killer.join(1)
    assert killed
    check_same(output, calm)
    check_kept(output, [27, 30])


@pytest.mark.parametrize("output", ["bucket", "ceph_bucket"], indirect=True)
def test_a_cut_checkpoint_on_s3_is_not_used(
    calm: str, priors: Path, output: str, tmp_path: Path
) -> None:
    """It is made again, since the run goes on from the one before."""
    settings = values(output, priors, LORA, keep=100)
    cut_off(tmp_path, settings, 9)
    newest = checkpoints(output).list()[-1]
    uri = storage.join(output, "checkpoints", f"step-{newest.step:08d}", "state.pt")
    state = storage.read_bytes(uri)
    storage.write_bytes(uri, state[: len(state) // 2])
    left = checkpoints(output).latest()
    assert left is not None
    assert left.step == newest.step - 3
    finish(tmp_path, settings)
    check_same(output, calm)
    check_kept(output, list(range(3, 31, 3)))


def test_a_cut_last_checkpoint_is_made_again(calm: str, priors: Path, tmp_path: Path) -> None:
    """As when a run ends between its last checkpoint and its export."""
    output = str(tmp_path / "out")
    shutil.copytree(calm, output)
    storage.remove_folder(storage.join(output, "export"))
    state = tmp_path / "out" / "checkpoints" / "step-00000030" / "state.pt"
    os.truncate(state, state.stat().st_size // 2)
    run(values(output, priors, LORA))
    check_same(output, calm)
    check_kept(output, [27, 30])


@pytest.fixture
def alone(priors: Path, tmp_path: Path) -> str:
    """A long run of one worker. Ray looks for new nodes only every 20 s."""
    output = str(tmp_path / "alone")
    run(values(output, priors, LONG))
    return output


@pytest.fixture
def cluster(alone: str) -> Iterator[Cluster]:
    """One node with a CPU for one worker; made after a session of this process, which may switch
    Ray's authentication on for it and for all that it starts."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    yield made
    made.shutdown()


def test_a_cluster_grows_and_shrinks(
    priors: Path, tmp_path: Path, alone: str, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node comes, and goes without a word; every step is as with one worker."""
    output = str(tmp_path / "out")
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    settings = values(output, priors, LONG, every=10, keep=100, max=2, resize_interval_s=3)
    with start(tmp_path, settings) as process:
        try:
            wait_for(output, 10, workers=1)
            node = cluster.add_node(num_cpus=1)
            wait_for(output, 20, workers=2)
            cluster.remove_node(node, allow_graceful=False)
            said, _ = process.communicate(timeout=240)
        finally:
            process.kill()
    assert process.returncode == 0, said.decode()
    check_kept(output, list(range(10, 401, 10)))
    counts = [each.facts["workers"] for each in checkpoints(output).list()]
    assert (counts[0], counts[-1], set(counts)) == (1, 1, {1, 2})
    assert losses(output) == pytest.approx(losses(alone), abs=1e-5)


def test_a_checkpoint_is_written_at_once_on_notice(
    priors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that is drained and then gone costs no step that was made before the notice."""
    output = str(tmp_path / "out")
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    node = made.add_node(num_cpus=1)
    monkeypatch.setenv("RAY_ADDRESS", made.address)
    settings = values(output, priors, LONG, every=100, keep=100, min=1, max=2)
    with start(tmp_path, settings) as process:
        try:
            wait_for(output, 100, workers=2)
            drain(made.address, node, 30)
            wait_for(output, 101)
            found = [each.step for each in checkpoints(output).list()]
            made.remove_node(node, allow_graceful=False)
            said, _ = process.communicate(timeout=240)
        finally:
            process.kill()
            made.shutdown()
    assert process.returncode == 0, said.decode()
    assert found[-1] % 100, found
    assert len(losses(output)) == 400


@pytest.fixture(scope="module")
def sharded(priors: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run of two workers with shards that nobody disturbed."""
    output = str(tmp_path_factory.mktemp("sharded") / "out")
    run(values(output, priors, FULL | {"strategy": "fsdp"}, min=2))
    return output


def test_shards_give_the_same_losses(priors: Path, sharded: str, tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    run(values(output, priors, FULL | {"strategy": "ddp"}, min=2))
    assert losses(output) == pytest.approx(losses(sharded), abs=1e-5)
    check_kept(sharded, [21, 24])
    ours, theirs = weights(sharded), weights(output)
    assert ours.keys() == theirs.keys()
    assert all((ours[name] - theirs[name]).abs().max() <= 1e-4 for name in theirs)


def test_shards_of_a_killed_driver(priors: Path, sharded: str, tmp_path: Path) -> None:
    """As many workers go on with them, and so does one alone."""
    output, copy = tmp_path / "out", tmp_path / "copy"
    settings = values(str(output), priors, FULL | {"strategy": "fsdp"}, min=2)
    cut_off(tmp_path, settings, 6)
    shutil.copytree(output, copy)
    finish(tmp_path, settings)
    fewer = settings | {"workers": {"min": 1}, "output": {"uri": str(copy)}}
    finish(tmp_path, fewer)
    for each in (output, copy):
        assert losses(str(each)) == pytest.approx(losses(sharded), abs=1e-6)
        check_kept(str(each), [21, 24])
    ours, theirs = weights(str(output)), weights(sharded)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    (last,) = [each for each in checkpoints(str(copy)).list() if each.step == 24]
    assert last.facts["workers"] == 1


def weights(output: str) -> dict[str, torch.Tensor]:
    """Of the exported UNet, as plain diffusers loads it."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(Path(output) / "export")
    return pipeline.unet.state_dict()
