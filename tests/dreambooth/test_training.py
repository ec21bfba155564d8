"""Runs on Ray Train's workers: resumed, spread over workers, killed, refused.

What every run must come to is computed without Ray: the same steps in this process.
"""

import dataclasses
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
from typing import Any, NamedTuple

import pytest
import yaml
from safetensors.torch import load, load_file

from rayjobs import storage
from rayjobs.cli import main
from rayjobs.config import BadInput, JobFailed
from rayjobs.dreambooth import composition, export, job, report, results
from rayjobs.dreambooth.checkpoints import Checkpoints
from rayjobs.dreambooth.config import DreamBoothConfig
from rayjobs.dreambooth.resolved import ResolvedRun, resolve
from rayjobs.models import exports
from rayjobs.storage import StorageError
from tests.dreambooth import fitting

# Ray Train's own; Lightning reads deprecated parts of torch.
pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]
ROOT = Path(__file__).parents[2]
SUBJECT = ROOT / "configs" / "demo" / "subject"
SHORT = {"steps": 8, "global_batch_size": 4, "learning_rate": 1e-3}
LONG = SHORT | {"steps": 15}


@pytest.fixture(scope="module")
def priors(tmp_path_factory: pytest.TempPathFactory, picture: Callable[[int], Any]) -> Path:
    """Class pictures of the user's own."""
    folder = tmp_path_factory.mktemp("priors")
    for number in range(6):
        picture(number).save(folder / f"{number}.png")
    return folder


def values(output: str, priors: Path, **keys: Any) -> dict[str, Any]:
    return {
        "model": {"uri": "starter"},
        "instance": {"uri": str(SUBJECT), "prompt": "a photo of a sks star"},
        "prior": {"prompt": "a photo of a star", "num_images": 6, "uri": str(priors)},
        "train": SHORT,
        "lora": {"rank": 4, "dropout": 0.2},
        "checkpoint": {"every_n_steps": 3, "keep": 2},
        "validation": {"steps": 2},
        "run": {"name": "test"},
        "output": {"uri": output},
    } | keys


class Calm(NamedTuple):
    """What a run that nobody disturbs comes to."""

    losses: list[float]
    weights: Path


def resolved(output: str, priors: Path, **keys: Any) -> ResolvedRun:
    config = DreamBoothConfig.model_validate(values(output, priors, **keys))
    return composition.with_class_images(resolve(config))


def losses(output: str) -> list[float]:
    lines = storage.read_bytes(storage.join(output, "metrics.jsonl")).decode().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


@pytest.fixture(scope="module")
def calm(priors: Path, tmp_path_factory: pytest.TempPathFactory) -> Calm:
    """All steps in this process, and what they export."""
    folder = tmp_path_factory.mktemp("calm")
    run = resolved(str(folder), priors, train=LONG)
    tuned, rows = fitting.fit(run)
    (folder / "export").mkdir()
    export.save(run.config, tuned, folder / "export")
    return Calm([row["loss"] for row in rows], folder / "export" / exports.LORA_FILE)


@pytest.fixture(scope="module")
def spread(ray_cluster: None, priors: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a run on two workers, which make their shares of a batch one by one."""
    output = str(tmp_path_factory.mktemp("spread") / "out")
    train = SHORT | {"micro_batch_size": 1}
    job.run(resolved(output, priors, train=train, workers={"min": 2}))
    return output


def test_more_workers_and_smaller_calls_see_the_same_batch(calm: Calm, spread: str) -> None:
    assert losses(spread) == pytest.approx(calm.losses[:8], abs=1e-5)
    steps = [checkpoint.step for checkpoint in Checkpoints(f"{spread}/checkpoints").list()]
    assert steps == [6, 8]


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "most"), [(2, None), (4, None), (1, 1)])
def test_workers_and_calls(
    calm: Calm, ray_cluster: None, priors: Path, tmp_path: Path, workers: int, most: int | None
) -> None:
    output = str(tmp_path / "out")
    train = SHORT | {"micro_batch_size": most}
    job.run(resolved(output, priors, train=train, workers={"min": workers}))
    assert losses(output) == pytest.approx(calm.losses[:8], abs=1e-5)


def start(folder: Path, run: dict[str, Any], variables: dict[str, str]) -> subprocess.Popen[bytes]:
    """The command for this run, in a process of its own."""
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    command = [sys.executable, "-m", "rayjobs", "dreambooth", str(folder / "run.yaml")]
    pipe = subprocess.PIPE
    # A shell's background jobs, of which this may be one, are started deaf to SIGINT.
    listening = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | variables,
        stdout=pipe,
        stderr=pipe,
        preexec_fn=listening,
    )


def wait_for_checkpoint(output: str, step: int) -> None:
    checkpoints = Checkpoints(storage.join(output, "checkpoints"))
    deadline = time.monotonic() + 120
    while not any(checkpoint.step >= step for checkpoint in checkpoints.list()):
        assert time.monotonic() < deadline
        time.sleep(0.4)  # each look costs the S3 server and this process


@pytest.mark.parametrize(
    "sign",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, marks=pytest.mark.slow),
    ],
)
def test_a_stopped_driver_is_started_again(
    calm: Calm,
    joining: dict[str, str],
    priors: Path,
    tmp_path: Path,
    bucket: str,
    sign: signal.Signals,
) -> None:
    """And then its worker is killed: bit for bit, on S3, what the undisturbed steps give."""
    output = f"{bucket}/stopped"
    run = values(output, priors, train=LONG)
    shorter = values(output, priors, train=LONG | {"steps": 14})
    with start(tmp_path, shorter, joining) as process:
        wait_for_checkpoint(output, 3)
        process.send_signal(sign)
        _, said = process.communicate(timeout=60)
    assert exports.read(f"{output}/export") is None
    if sign != signal.SIGKILL:
        assert process.returncode == 130, said
        assert b"continues where this stopped" in said
        assert b"Traceback" not in said
    killed: list[int] = []

    def kill_worker() -> None:
        wait_for_checkpoint(output, 9)
        killed.append(train_worker(os.getpid()))
        os.kill(killed[0], signal.SIGKILL)

    threading.Thread(target=kill_worker, daemon=True).start()
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    assert main(["dreambooth", str(tmp_path / "run.yaml")]) == 0
    assert killed
    assert losses(output) == calm.losses
    made = load(storage.read_bytes(storage.join(output, "export", exports.LORA_FILE)))
    wanted = load_file(calm.weights)
    assert made.keys() == wanted.keys()
    assert all((made[name] == wanted[name]).all() for name in wanted)
    assert composition.train(DreamBoothConfig.model_validate(run)).was_finished


def test_a_changed_run_is_refused(spread: str, priors: Path) -> None:
    """Also when it is finished: nobody takes its weights for those of the new settings."""
    other = {"uri": str(priors), "prompt": "a photo of a sks star"}
    for changed, told in [
        ({"train": SHORT | {"learning_rate": 0.1}}, r"train.learning_rate: 0.001 there, 0.1 now"),
        ({"lora": {"rank": 8, "dropout": 0.2}}, r"lora.rank: 4 there, 8 now"),
        ({"instance": other}, r"photos"),
    ]:
        config = DreamBoothConfig.model_validate(values(spread, priors, **changed))
        with pytest.raises(BadInput, match=told):
            composition.train(config)
        with pytest.raises(BadInput, match=told):
            job.run(resolved(spread, priors, **changed))


def test_a_page_that_cannot_be_written_costs_no_export(
    spread: str,
    priors: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is told, and the same command makes it later."""

    def fail(run: ResolvedRun, **_: object) -> str:
        raise StorageError("full")

    config, page = (
        DreamBoothConfig.model_validate(values(spread, priors)),
        Path(spread, "index.html"),
    )
    page.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(report, "write", fail)
        assert composition.train(config).report_uri is None
    assert "the run's page could not be written: full" in capsys.readouterr().err
    assert not page.exists()
    assert composition.train(config).report_uri == str(page)
    assert page.is_file()
    assert composition.train(config).was_finished


def test_what_a_finished_run_lacks_is_made(spread: str, priors: Path) -> None:
    """And no more: nothing is trained, and what is there is made as it was."""
    before = exports.read(f"{spread}/export")
    assert before is not None
    more = values(spread, priors) | {"output": {"uri": spread, "kohya": True}}
    done = composition.train(DreamBoothConfig.model_validate(more))
    assert (done.steps, done.was_finished) == (0, False)
    after = exports.read(f"{spread}/export")
    assert after is not None
    assert after.files.keys() - before.files.keys() == {exports.KOHYA_FILE}
    assert Path(spread, "export", exports.KOHYA_FILE).is_file()
    assert before.files.items() <= after.files.items()
    assert composition.train(DreamBoothConfig.model_validate(more)).was_finished
    assert "validation.every_n_steps was 0" in Path(spread, "index.html").read_text()
    # What is not asked for any more may stay.
    assert composition.train(DreamBoothConfig.model_validate(values(spread, priors))).was_finished


@pytest.mark.slow
def test_a_finished_run_gets_more_steps(
    calm: Calm, ray_cluster: None, priors: Path, tmp_path: Path
) -> None:
    """Bit for bit what they had been in one go, also where the note is an older version's."""
    output = str(tmp_path / "out")
    job.run(resolved(output, priors))
    note = exports.read(f"{output}/export")
    assert note is not None
    exports.write(f"{output}/export", dataclasses.replace(note, steps=0, dtype=""))
    more = DreamBoothConfig.model_validate(values(output, priors, train=LONG))
    assert composition.train(more).steps == 7
    assert losses(output) == calm.losses
    made, wanted = load_file(Path(output, "export", exports.LORA_FILE)), load_file(calm.weights)
    assert all((made[name] == wanted[name]).all() for name in wanted)
    assert composition.train(more).was_finished


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_that_gains_nothing_ends(
    ray_cluster: None, priors: Path, tmp_path: Path, workers: int
) -> None:
    """After two losses that are no better; the best is exported, and more patience goes on."""
    output = str(tmp_path / "out")
    look = {"loss_every_n_steps": 3, "patience": 2, "loss_levels": 2}
    still = LONG | {"learning_rate": 1e-30}  # below what float32 tells apart
    keys: dict[str, Any] = {"train": still, "validation": look, "workers": {"min": workers}}
    done = composition.train(DreamBoothConfig.model_validate(values(output, priors, **keys)))
    measured = results.read_losses(output, 99)
    note = exports.read(f"{output}/export")
    assert note is not None
    assert note.step == results.step_of_least(measured)
    assert [step for step, _ in measured] == [3, 6, 9], measured
    assert (done.steps, note.step) == (9, 3)
    assert len(losses(output)) == done.steps
    again = composition.train(DreamBoothConfig.model_validate(values(output, priors, **keys)))
    assert again.was_finished
    keys["validation"] = look | {"patience": 9}
    more = composition.train(DreamBoothConfig.model_validate(values(output, priors, **keys)))
    assert more.steps == 15 - done.steps
    assert len(losses(output)) == 15


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


@pytest.mark.slow
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
        "num_class_images": 4,
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
    assert "preservation (up to 1, lower is better)" in page
    (events,) = Path(output, "logs").iterdir()
    assert b"train/loss" in events.read_bytes()
