"""`init`, `demo` and `--version`: what a newcomer types first, in a clone or outside it."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayjobs import keys, starting
from rayjobs.cli import KINDS, commands, main

COMMENTED_OUT = re.compile(r"^( *)#(?=(?:  )*\w+:)", re.MULTILINE)


def checked(kind: str, text: str) -> Any:
    values = yaml.safe_load(text)
    if kind == "serve":
        values = values["applications"][0]["args"]
    return keys.model_of(kind).model_validate(values)


@pytest.mark.parametrize("kind", KINDS)
def test_init_writes_a_valid_configuration(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", kind]) == 0
    checked(kind, Path(f"{kind}.yaml").read_text("utf-8"))


@pytest.mark.parametrize("kind", KINDS)
def test_keys_that_are_commented_out_show_their_defaults(kind: str) -> None:
    text = starting.starting_text(kind, "job.yaml")
    every_key = COMMENTED_OUT.sub(r"\1", text)
    assert every_key != text
    assert checked(kind, every_key) == checked(kind, text)


@pytest.mark.parametrize("kind", KINDS)
def test_every_key_is_in_the_starting_configuration(kind: str) -> None:
    text = starting.starting_text(kind, "job.yaml")
    for key in keys.keys(keys.model_of(kind)):
        if "[]" not in key.path:
            assert re.search(rf"^ *#? *{key.path.rpartition('.')[2]}:", text, re.MULTILINE), key


def test_init_never_overwrites(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("mine")
    assert main(["init", "generate", str(path)]) == 2
    assert "mine.yaml exists; give another name" in capsys.readouterr().err
    assert path.read_text() == "mine"
    assert main(["init", "generate", str(tmp_path / "no" / "job.yaml")]) == 2


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert re.fullmatch(r"rayjobs \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_demo_runs_the_shipped_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    run: list[str] = []
    monkeypatch.setattr(commands, "generate", lambda options: run.append(options.config) or 0)
    assert main(["demo"]) == 0
    assert Path(run[0]).is_file()
