"""Runs on Ray Train's workers: resumed, spread over workers, killed, refused."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load

from rayjobs import storage
from rayjobs.cli import main
from rayjobs.config import BadInput, JobFailed
from rayjobs.dreambooth import composition, job, results
from rayjobs.dreambooth.config import DreamBoothConfig
from rayjobs.dreambooth.resolved import ResolvedRun, resolve
from rayjobs.dreambooth.training.checkpoints import Checkpoints
from rayjobs.models import exports

# Ray Train's own; Lightning reads deprecated parts of torch.
pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]
ROOT = Path(__file__).parents[2]
SUBJECT = ROOT / "configs" / "demo" / "subject"


@pytest.fixture(scope="module")
def priors(tmp_path_factory: pytest.TempPathFactory, picture: Callable[[int], Any]) -> Path:
    """Class pictures of the user's own."""
    folder = tmp_path_factory.mktemp("priors")
    for number in range(6):
        picture(number).save(folder / f"{number}.png")
    return folder


def values(output: str, priors: Path, steps: int = 8, **keys: Any) -> dict[str, Any]:
    return {
        "model": {"uri": "starter"},
        "instance": {"uri": str(SUBJECT), "prompt": "a photo of a sks star"},
        "prior": {"prompt": "a photo of a star", "num_images": 6, "uri": str(priors)},
        "train": {"steps": steps, "global_batch_size": 4, "learning_rate": 1e-3},
        "lora": {"rank": 4, "dropout": 0.2},
        "checkpoint": {"every_n_steps": 3, "keep": 2},
        "run": {"name": "test"},
        "output": {"uri": output},
    } | keys


def resolved(output: str, priors: Path, **keys: Any) -> ResolvedRun:
    config = DreamBoothConfig.model_validate(values(output, priors, **keys))
    return composition.with_class_images(resolve(config))


def losses(output: str) -> list[float]:
    lines = storage.read_bytes(storage.join(output, "metrics.jsonl")).decode().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


@pytest.fixture(scope="module")
def one_worker(
    ray_cluster: None, priors: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[float]:
    output = str(tmp_path_factory.mktemp("one") / "out")
    job.run(resolved(output, priors))
    return losses(output)


@pytest.mark.parametrize("workers", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_more_workers_see_the_same_batch(
    one_worker: list[float], priors: Path, tmp_path: Path, workers: int
) -> None:
    output = str(tmp_path / "out")
    job.run(resolved(output, priors, workers={"min": workers}))
    assert losses(output) == pytest.approx(one_worker, abs=1e-5)
    steps = [checkpoint.step for checkpoint in Checkpoints(f"{output}/checkpoints").list()]
    assert steps == [6, 8]


def test_small_calls_give_the_same_step(
    one_worker: list[float], priors: Path, tmp_path: Path
) -> None:
    output = str(tmp_path / "out")
    train = values(output, priors)["train"] | {"micro_batch_size": 1}
    job.run(resolved(output, priors, train=train))
    assert losses(output) == pytest.approx(one_worker, abs=1e-5)


def start(folder: Path, run: dict[str, Any]) -> subprocess.Popen[bytes]:
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    command = [sys.executable, "-m", "rayjobs", "dreambooth", str(folder / "run.yaml")]
    pipe = subprocess.PIPE
    # A shell's background jobs, of which this may be one, are started deaf to SIGINT.
    listening = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, preexec_fn=listening)


def wait_for_checkpoint(output: str, step: int) -> None:
    checkpoints = Checkpoints(storage.join(output, "checkpoints"))
    deadline = time.monotonic() + 120
    while not any(checkpoint.step >= step for checkpoint in checkpoints.list()):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_killed_driver_is_started_again(
    one_worker: list[float],
    priors: Path,
    tmp_path: Path,
    bucket: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Bit for bit, on S3, what one undisturbed run gives; then there is nothing to do."""
    calm, killed = str(tmp_path / "calm"), f"{bucket}/killed"
    long = {"steps": 24, "global_batch_size": 4, "learning_rate": 1e-3}
    job.run(resolved(calm, priors, train=long))
    run = values(killed, priors, train=long)
    process = start(tmp_path, run)
    wait_for_checkpoint(killed, 6)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert exports.read(f"{killed}/export") is None
    process = start(tmp_path, run)
    _, said = process.communicate(timeout=180)
    assert process.returncode == 0, said
    assert losses(killed) == losses(calm)
    assert losses(killed)[:8] == one_worker
    uris = [storage.join(each, "export", exports.LORA_FILE) for each in (calm, killed)]
    weights = [load(storage.read_bytes(uri)) for uri in uris]
    assert weights[0].keys() == weights[1].keys()
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])
    assert main(["dreambooth", str(tmp_path / "run.yaml")]) == 0
    assert capsys.readouterr().out.startswith("nothing to do")


@pytest.mark.parametrize(
    "sign", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM]
)
def test_an_interruption(priors: Path, tmp_path: Path, sign: signal.Signals) -> None:
    output = str(tmp_path / "out")
    long = {"steps": 500, "global_batch_size": 4}
    process = start(tmp_path, values(output, priors, train=long))
    wait_for_checkpoint(output, 3)
    process.send_signal(sign)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert b"continues where this stopped" in said
    assert b"Traceback" not in said


def test_a_changed_run_is_refused(ray_cluster: None, priors: Path, tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    short = {"steps": 1, "global_batch_size": 4}
    job.run(resolved(output, priors, train=short))
    with pytest.raises(BadInput, match=r"train.learning_rate: 0.0001 there, 0.1 now"):
        job.run(resolved(output, priors, train=short | {"learning_rate": 0.1}))


def test_a_worker_dies(ray_cluster: None, priors: Path, tmp_path: Path, one_worker: Any) -> None:
    """Ray starts a new one, which goes on from the latest checkpoint."""
    output = str(tmp_path / "out")
    killed: list[int] = []

    def kill() -> None:
        wait_for_checkpoint(output, 3)
        killed.append(train_worker(os.getpid()))
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    train = {"steps": 30, "global_batch_size": 4, "learning_rate": 1e-3}
    job.run(resolved(output, priors, train=train))
    killer.join(1)
    assert killed
    assert losses(output)[:8] == one_worker
    assert [c.step for c in Checkpoints(f"{output}/checkpoints").list()] == [27, 30]


def train_worker(root: int) -> int:
    """A Ray Train worker among the processes that `root` started, and those that they started."""
    asked = ["ps", "-eo", "pid=,ppid=,args="]
    lines = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()
    rows = [
        (int(pid), int(parent), args) for pid, parent, args in (x.split(None, 2) for x in lines)
    ]
    family = {root}
    while more := {pid for pid, parent, _ in rows if parent in family} - family:
        family |= more
    return next(pid for pid, _, args in rows if pid in family and "RayTrainWorker" in args)


def test_what_will_not_mend_is_told_once(ray_cluster: None, priors: Path, tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    wild = {"steps": 8, "global_batch_size": 4, "learning_rate": 1e30, "method": "full"}
    with pytest.raises(JobFailed, match=r"not a number; lower train\.learning_rate"):
        job.run(resolved(output, priors, train=wild))


def test_pictures_metrics_and_the_page(ray_cluster: None, priors: Path, tmp_path: Path) -> None:
    """Checkpoints are looked at beside training; the best one is exported, and all is shown."""
    output = str(tmp_path / "out")
    look = {
        "every_n_steps": 2,
        "prompts": ["a sks star on a red background"],
        "num_images": 2,
        "steps": 2,
        "encoders": {"subject": "starter", "prompt": "starter"},
    }
    run = resolved(
        output,
        priors,
        train={"steps": 6, "global_batch_size": 2, "learning_rate": 1e-3},
        checkpoint={"every_n_steps": 2, "keep": 1},
        validation=look,
    )
    job.run(run)
    seen = results.read(output)
    assert [result.step for result in seen] == [0, 2, 4, 6]
    note = exports.read(f"{output}/export")
    assert note is not None
    assert note.step == results.best_step(seen)
    assert note.metrics == next(r.metrics for r in seen if r.step == note.step)
    kept = [checkpoint.step for checkpoint in Checkpoints(f"{output}/checkpoints").list()]
    assert kept == sorted({note.step, 6})
    page = Path(output, "index.html").read_text()
    shown = re.findall(r'src="(validation/[^"]+)"', page)
    assert len(shown) == 8
    assert all(Path(output, name).stat().st_size > 1000 for name in shown)
    assert "a sks star on a red background" in page
    (events,) = Path(output, "logs").iterdir()
    assert b"train/loss" in events.read_bytes()
