"""What earlier versions wrote still opens, resumes and verifies, with the results of their time.

The files were made by `make.py` beside them. The tests know the command line and the files only:
what is inside the packages may change, these may not. That the export is served is a test of
serving's registry.
"""

import importlib.metadata
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, features
from safetensors.numpy import load_file

from rayjobs.cli import main

# Ray Train's own; Lightning reads deprecated parts of torch.
pytestmark = [
    pytest.mark.model,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]
WRITTEN = Path(__file__).parent / "fixtures" / "before_rooms"
MADE_IN = "/data/before_rooms"
MEASURED = {"image", "image_sha256", "blank", "sharpness", "phash", "colours"}
"""Columns of a record that depend on the last bits of its pixels."""


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files, as if they had been made where they lie now.

    Locks name the places of models and adapters. These are not part of what a data set is, but
    workers of that time read the export of an unfinished one from the place in its lock.
    """
    place = shutil.copytree(WRITTEN, tmp_path_factory.mktemp("written") / "copy")
    for lock in place.rglob("spec.lock.json"):
        lock.write_text(lock.read_text().replace(MADE_IN, str(place)))
    return place


@pytest.fixture
def folder(copy: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(copy)
    return copy


@pytest.fixture(scope="module")
def is_same_class() -> bool:
    """Whether the processor and the libraries are such as the files were made with.

    Found out without the code's own word, so that a class which is told wrong fails.
    """
    recorded = json.loads((WRITTEN / "dataset" / "spec.lock.json").read_text())["determinism"]
    libraries = ("torch", "diffusers", "transformers", "pillow", "pyarrow", "numpy")
    here = {name: importlib.metadata.version(name) for name in libraries}
    here |= {name: features.version(name) for name in ("zlib", "libjpeg_turbo", "webp")}
    cpu = torch.backends.cpu.get_cpu_capability()
    vendors = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if "vendor_id" in x]
    vendor = vendors[0].split(":")[1].strip() if vendors else "CPU"
    same_libraries = all(recorded[name] == version for name, version in here.items())
    return same_libraries and recorded["device"].startswith(f"{vendor} {cpu},")


def assert_same_records(made: Path, written: Path, is_same_class: bool) -> None:
    """Byte for byte within a determinism class; beyond it, pixels may differ by one level."""
    if is_same_class:
        assert made.read_bytes() == written.read_bytes()
    for row, old in zip(
        *(pq.read_table(file).to_pylist() for file in (made, written)), strict=True
    ):
        assert row["status"] == "ok", row["error"]
        assert [k for k in row if row[k] != old[k] and k not in MEASURED] == []
        assert np.abs(pixels(row["image"]["bytes"]) - pixels(old["image"]["bytes"])).max() <= 1


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), int)


def test_a_data_set_verifies(
    folder: Path, is_same_class: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", "dataset"]) == 0
    assert capsys.readouterr().out == "2 shards, 4 records: all is well\n"
    code = main(["verify", "dataset", "--regenerate", "4"])
    said = capsys.readouterr()
    if is_same_class:
        assert code == 0, said.out
        assert said.out.endswith("made again: all is well\n")
    else:
        assert code == 2
        assert "cannot make the same bits" in said.err


def test_an_interrupted_data_set_goes_on(
    in_process: None, folder: Path, is_same_class: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of an export's pictures: the adapter and the words are the same by their hashes."""
    output = "tuned-unfinished"
    assert main(["verify", output]) == 0
    assert capsys.readouterr().out == "2 shards, 4 records, 1 shards not finished: all is well\n"
    job = ["generate", "generate.yaml", "model.uri=runs/sks/export", f"output.uri={output}"]
    change = f"engine.allow_class_change={'false' if is_same_class else 'true'}"
    assert main([*job, "seeds.count=3", change]) == 0
    assert capsys.readouterr().out.startswith("made 2 images")
    for number in range(3):
        file = f"data/shard-{number:08d}.parquet"
        was_there = number < 2
        made, calm = folder / output / file, folder / "tuned" / file
        assert_same_records(made, calm, is_same_class or was_there)
    assert main(["verify", output]) == 0
    assert capsys.readouterr().out == "3 shards, 6 records: all is well\n"


@pytest.mark.ray
@pytest.mark.slow
def test_an_interrupted_run_goes_on(
    ray_cluster: None, folder: Path, is_same_class: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its losses are those of the run that was not interrupted, `runs/sks`.

    Its weights are nearly so: their average warms up since.
    """
    assert main(["dreambooth", "dreambooth.yaml", "output.uri=run-unfinished"]) == 0
    assert "3 steps in" in capsys.readouterr().out  # where Ray too may warn
    run, calm = folder / "run-unfinished", folder / "runs" / "sks"
    texts = [(each / "metrics.jsonl").read_text() for each in (run, calm)]
    rows = [[json.loads(line) for line in text.splitlines()] for text in texts]
    assert rows[0][:3] == rows[1][:3]
    losses = [[row["loss"] for row in each] for each in rows]
    assert losses[0] == (losses[1] if is_same_class else pytest.approx(losses[1], abs=1e-5))
    for name in ("pytorch_lora_weights.safetensors", "learned_embeds.safetensors"):
        new, old = (load_file(each / "export" / name) for each in (run, calm))
        assert new.keys() == old.keys()
        # Three steps of at most the learning rate, of the six.
        assert all(np.abs(new[key] - old[key]).max() <= 3 * 5e-3 for key in new), name
    notes: list[dict[str, Any]] = [
        json.loads((each / "export" / "manifest.json").read_text()) for each in (run, calm)
    ]
    assert notes[0] | notes[1] | {"files": {}} == notes[0] | {"files": {}}
    assert notes[0]["files"].keys() == notes[1]["files"].keys()


def test_a_finished_run_is_left_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "runs/sks/index.html").write_text("the run's page, which the fixture is spared")
    assert main(["dreambooth", "dreambooth.yaml"]) == 0
    assert capsys.readouterr().out.startswith("nothing to do")
