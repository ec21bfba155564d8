"""The command line: bad input is one message and exit code 2, before anything is started."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.numpy import save_file

from rayjobs import cli
from rayjobs.cli import main
from rayjobs.generation import job

ROOT = Path(__file__).parents[1]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that runs `generate` with some keys changed, and fails if workers are started."""

    def refuse(*_: object) -> None:
        raise AssertionError("workers were started")

    monkeypatch.setattr(job, "_make", refuse)
    monkeypatch.setattr("rayjobs.generation.worker.pool.session", refuse)

    def run(**changes: Any) -> int:
        values: dict[str, Any] = {
            "model": {"uri": "starter"},
            "prompts": {"inline": ["a red star"]},
            "output": {"uri": str(tmp_path / "out")},
        }
        for key, value in changes.items():
            values[key] = value
        path = tmp_path / "job.yaml"
        path.write_text(yaml.safe_dump(values))
        return main(["generate", str(path)])

    return run


def pickled(folder: Path) -> Path:
    for part in ("unet", "vae", "text_encoder"):
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text("{}")
        (folder / part / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def damaged(folder: Path) -> Path:
    pickled(folder)
    (folder / "unet" / "model.safetensors").write_bytes(b"\xff" * 40)
    return folder


def flux(folder: Path) -> Path:
    folder.mkdir()
    (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    return folder


def test_overrides_may_stand_behind_options(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "job.yaml", "a.b=1", "--limit", "3", "c=2", "--extend", "d=3"]
    options = cli.parse(command)
    assert (options.overrides, options.limit, options.extend) == (["a.b=1", "c=2", "d=3"], 3, True)
    for wrong in (["verify", "x", "a=1"], ["generate", "job.yaml", "--extent"]):
        with pytest.raises(SystemExit):
            cli.parse(wrong)
        assert f"unrecognized arguments: {wrong[-1]}" in capsys.readouterr().err


def test_bad_input_is_told_and_ends_with_2(
    config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("text,seed\na star,1\n")
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "bad.csv").write_text("prompt,seed\na star,one\n")
    (tmp_path / "taken.csv").write_text("prompt,status\na star,x\n")
    (tmp_path / "bad.jsonl").write_text("{not json\n")
    weights = tmp_path / "weights.ckpt"
    weights.write_bytes(b"pickle")
    save_file({}, tmp_path / "empty.safetensors")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"sampler": {"name": "eulr"}}, "unknown sampler 'eulr'"),
        ({"sampler": {"name": "edm_euler"}}, "does not fit a model that is not EDM"),
        ({"sampler": {"name": "euler", "options": {"karras": True}}}, "has no option 'karras'"),
        ({"image": {"width": 100}}, "image.width is 100; it must be a multiple of 8, such as 96"),
        ({"prompts": {"uri": str(tmp_path / "no.txt")}}, "no.txt does not exist"),
        ({"prompts": {"uri": str(prompts)}}, "has no column 'prompt'; it has text, seed"),
        ({"prompts": {"uri": str(tmp_path / "empty.txt")}}, "there is no prompt in"),
        ({"prompts": {"uri": str(tmp_path / "bad.csv")}}, "'one', which is not a number"),
        ({"prompts": {"uri": str(tmp_path / "taken.csv")}}, "has a column 'status'"),
        ({"prompts": {"uri": str(tmp_path / "bad.jsonl")}}, "cannot be read as jsonl"),
        ({"prompts": {"uri": str(tmp_path)}}, "is none of txt, csv"),
        ({"prompts": {"templates": ["a {colour} star"]}}, "there is no such axis"),
        ({"model": {"uri": "/no/such"}}, "'/no/such' does not exist"),
        ({"model": {"uri": str(weights)}}, "is a pickle"),
        ({"model": {"uri": str(pickled(tmp_path / "p"))}}, "is a pickle"),
        ({"model": {"uri": str(damaged(tmp_path / "d"))}}, "cannot be read"),
        ({"model": {"uri": str(flux(tmp_path / "f"))}}, "is a FluxPipeline"),
        ({"model": {"uri": "starter", "loras": [{"uri": "/no"}]}}, "LoRA /no does not exist"),
        ({"init": {"uri": str(tmp_path / "p")}}, "holds no picture"),
        ({"init": {"uri": "x", "strength": 0.01}}, "leaves no step to make"),
        ({"output": {"uri": "/proc/no/place"}}, "/proc/no/place"),
        ({"output": {"uri": "ftp://host/x"}}, "unknown kind of storage"),
    ]
    for changes, told in cases:
        assert config(**changes) == 2, changes
        error = capsys.readouterr().err
        assert told in error
        assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_a_report_needs_a_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "is no data set" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_show_prints_every_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(ROOT / "configs/demo/generate.yaml"), "sampler.steps=7"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["sampler"]["steps"] == 7
    assert shown["workers"]["num_gpus"] == 0


SHIPPED = sorted([*ROOT.glob("configs/*.yaml"), *ROOT.glob("configs/demo/*.yaml")])


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_shipped_configuration_is_shown(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", str(path)]) == 0
    assert yaml.safe_load(capsys.readouterr().out)
    assert main(["show", str(path), "no_such_key=1"]) == 2
    assert "no_such_key: unknown key" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("prior", "24 class images: 2 prompts x 12"),
        ("dreambooth", "4 photographs, 48 class images; full, 500 steps"),
        ("serve", "an image API with starter"),
    ],
)
def test_other_kinds_are_planned(
    name: str, told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    path = f"configs/demo/{name}.yaml"
    assert main(["plan", path]) == 0
    assert told in capsys.readouterr().out
    assert main(["plan", path, "--probe"]) == 2
    assert f"is for {name}" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_what_ends_a_job_from_outside_interrupts_it(
    number: int,
    config: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What `timeout` sends twice, while the job ends, is heard once."""

    def end(*_: Any, **__: Any) -> None:
        try:
            os.kill(os.getpid(), number)
        finally:
            if number != signal.SIGINT:
                os.kill(os.getpid(), number)

    monkeypatch.setattr(job, "run", end)
    ends = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    before = {each: signal.getsignal(each) for each in ends}
    # A shell's background jobs, of which this may be one, are started deaf to some.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert config() == 130
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert "continues where this stopped" in capsys.readouterr().err
