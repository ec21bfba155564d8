"""A run's page: what it shows at each moment, and that what it tells to copy works."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from rayjobs import starting
from rayjobs.config import load_config
from rayjobs.dreambooth import report, results
from rayjobs.dreambooth.config import DreamBoothConfig
from rayjobs.dreambooth.data.photos import find_photos
from rayjobs.dreambooth.report import chart, use
from rayjobs.dreambooth.resolved import ResolvedRun
from rayjobs.dreambooth.results import Result
from rayjobs.generation.config import GenerateConfig
from rayjobs.models import exports
from rayjobs.models.exports import ExportNote
from rayjobs.reports.running import Running
from serve.file import ServeFile

PROMPT = 'a photo of a "sks" dog\'s star'


def configure(folder: Path, **keys: Any) -> DreamBoothConfig:
    values: dict[str, Any] = {
        "model": {"uri": "starter"},
        "instance": {"uri": str(folder / "photos"), "prompt": PROMPT},
        "prior": {"prompt": "a photo of a star", "num_images": 48},
        "train": {"method": "full", "steps": 20},
        "checkpoint": {"every_n_steps": 10},
        "validation": {"every_n_steps": 10},
        "run": {"name": "first"},
        "output": {"uri": str(folder / "run's")},
    }
    return DreamBoothConfig.model_validate(values | keys)


@pytest.fixture
def run(tmp_path: Path, picture: Callable[[int], Image.Image]) -> ResolvedRun:
    (tmp_path / "photos").mkdir()
    picture(1).save(tmp_path / "photos" / "1.png")
    config = configure(tmp_path)
    photos = find_photos(config.instance.uri, config.instance.prompt)
    return ResolvedRun(config, "9f" * 32, tuple(photos))


def page_of(run: ResolvedRun) -> str:
    return Path(run.config.output.uri, "index.html").read_text()


def train(run: ResolvedRun, steps: int) -> None:
    rows = [json.dumps({"step": n, "loss": 0.1}) for n in range(1, steps + 1)]
    Path(run.config.output.uri, "metrics.jsonl").write_text("\n".join(rows))


def export(run: ResolvedRun, kind: str) -> None:
    empty: dict[str, Any] = dict.fromkeys(("base_uri", "base_sha256", "family", "identifier"), "")
    note = ExportNote(
        kind=kind, instance_prompt=PROMPT, step=20, seed=0, files={}, photos={}, **empty
    )
    exports.write(run.export_uri, note)


def test_the_page_goes_with_the_run(run: ResolvedRun) -> None:
    going = Running(1.8e9, 1.8e9 + 60, 12, 20, 2.0, "steps")
    report.write(run, going)
    assert "12 of 20 steps of this run, 2.00 steps/s, 4.0 s left" in page_of(run)
    assert "Use it" not in page_of(run)
    train(run, 10)
    results.write(run.config.output.uri, Result(0, None, {"preservation": 0.5}, {PROMPT: "0.jpg"}))
    results.write(run.config.output.uri, Result(10, 0.5, {"preservation": 0.6}, {PROMPT: "1.jpg"}))
    report.write(run, going)
    assert re.findall(r'src="(validation/[^"]+)"', page_of(run)) == [
        "validation/0.jpg",
        "validation/1.jpg",
    ]
    assert "<b>0.600</b><span>preservation (up to 1, lower is better)</span>" in page_of(run)
    train(run, 20)
    export(run, "full")
    report.write(run, work={"Speed": "2.00 steps/s", "Device": "a device"})
    page = page_of(run)
    assert 'class="now"' not in page
    assert "<b>step 20</b><span>exported" in page
    assert "full / images" not in page
    for fact in ("all weights of the UNet", "48 images of “a photo of a star”", "a device", "9f9f"):
        assert fact in page


def test_a_run_without_validation_shows_a_picture(run: ResolvedRun) -> None:
    export(run, "full")
    report.write(run)
    assert '<img src="validation/' not in page_of(run)
    place = Path(results.folder(run.config.output.uri), results.EXPORTED)
    place.parent.mkdir()
    place.write_bytes(b"a picture")
    report.write(run)
    assert f'<img src="validation/{results.EXPORTED}"' in page_of(run)


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("uri", ["/runs/it's here/export", "s3://bucket/run/export"])
def test_what_is_told_to_copy_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, uri: str
) -> None:
    """As far as nothing is made: it is parsed by what it is for."""
    monkeypatch.chdir(tmp_path)
    config = configure(tmp_path, train={"method": method}, model={"uri": "owner/model"})
    texts = [text for _, text in use.snippets(config, uri)]
    commands, served, download, in_python = texts
    init, generate = (shlex.split(line) for line in commands.replace("\\\n", "").splitlines())
    assert init[:3] == ["rayjobs", "init", "generate"]
    starting.write_starting(init[2], init[3])
    made = load_config(GenerateConfig, generate[2], generate[3:])
    assert made.model.uri == uri
    assert made.prompts.inline == (f"{PROMPT} on a beach",)
    file = ServeFile.model_validate(yaml.safe_load(served))
    (model,) = file.applications[0].args.models
    assert (model.uri, model.name) == (uri, "first")
    assert ("aws s3 cp" in download) == uri.startswith("s3://")
    compile(in_python, "snippet", "exec")
    assert ("load_lora_weights" in in_python) == (method == "lora")


def test_a_chart_s_scale_reads_well_and_holds_its_curve() -> None:
    losses = [0.3 - 0.01 * n for n in range(20)]
    drawn = chart.draw(losses, [(10, 0.2), (20, 0.15)])
    scale = re.findall(r"<span>([\d.]+)</span>", drawn.split('class="scale"')[1])[:5]
    assert scale == ["0.4", "0.3", "0.2", "0.1", "0"]
    each = re.search(r'class="each" d="M0\.0,(\S+) [^"]*L1000\.0,(\S+)"', drawn)
    assert each
    assert [float(y) for y in each.groups()] == pytest.approx([50, 145])  # 0.3 and 0.11 of 0.4
    assert 'class="fixed" d="M473.7,100.0 L1000.0,125.0"' in drawn
