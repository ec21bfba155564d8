"""Jobs whose pictures follow others: what records say of it, and which mistakes are told."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from rayjobs.cli import main
from rayjobs.dataset.manifest import Manifest
from rayjobs.generation import job
from rayjobs.generation.config import GenerateConfig

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

Picture = Callable[[int], Image.Image]
ROWS = "prompt,outline\na red star,one.png\na blue star,\na pink star,gone.png\n"


@pytest.fixture(scope="module")
def place(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, picture: Picture
) -> Path:
    """ControlNets, pictures and prompts in one folder."""
    from tests.controls import save_controlnets

    place = tmp_path_factory.mktemp("controls")
    save_controlnets(folders["sdxl"], place)
    save_controlnets(folders["sd"], place / "sd", 1)
    picture(1).save(place / "one.png")
    picture(2).save(place / "two.png")
    (place / "prompts.csv").write_text(ROWS)
    return place


def configured(model: Path, place: Path, output: Path, *controls: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": {"uri": str(model)},
        "prompts": {"uri": str(place / "prompts.csv")},
        "sampler": {"steps": 2, "guidance_scale": 3.0},
        "output": {"uri": str(output)},
        "engine": {"batch_size": 4},
        **({"controls": list(controls)} if controls else {}),
    }


def rows_of(values: dict[str, Any]) -> list[dict[str, Any]]:
    config = GenerateConfig.model_validate(values)
    job.run(config)
    assert job.run(config).num_made == 0
    manifest = Manifest(config.output.uri)
    return list(manifest.format.read(manifest.data, 0))


def test_rows_follow_their_own_pictures(
    folders: dict[str, Path], place: Path, tmp_path: Path, in_process: None
) -> None:
    """A row without one is the same as in a job without controls, up to its hash."""
    of_row = {"uri": str(place / "net-0"), "column": "outline", "scale": 1.5}
    of_all = {"uri": str(place / "net-1"), "image": str(place / "two.png"), "end": 0.5}
    plain, some, both = (
        rows_of(configured(folders["sdxl"], place, tmp_path / name, *controls))
        for name, controls in (("plain", []), ("some", [of_row]), ("both", [of_row, of_all]))
    )
    assert [row["status"] for row in some] == ["ok", "ok", "failed"]
    assert some[2]["error"] == "control image cannot be read: it is missing"
    assert [row["control_images"] for row in some] == [["one.png"], [None], ["gone.png"]]
    assert [row["control_images"] for row in both][:2] == [
        ["one.png", "two.png"],
        [None, "two.png"],
    ]
    for key in ("image_id", "image_sha256"):
        assert plain[1][key] == some[1][key] != both[1][key]
        assert len({rows[0][key] for rows in (plain, some, both)}) == 3
    assert "control_images" not in plain[0]


MISTAKES: list[tuple[str, dict[str, Any]]] = [
    ("controls.0.uri: ControlNet net-0 is not for this model", {"uri": "sd/net-0"}),
    ("controls.0.uri: ControlNet nowhere does not exist", {"uri": "nowhere"}),
    ("controls.0.image: control image cannot be read", {"image": "prompts.csv"}),
    ("nothing.png", {"image": "nothing.png"}),
    ("controls.0: give image, or column, and not both", {"column": "outline"}),
    ("has no column 'edges'; it has prompt, outline", {"image": None, "column": "edges"}),
    ("controls.0: a control goes from 0.5 to 0.2", {"start": 0.5, "end": 0.2}),
    ("controls.0.scale", {"scale": float("inf")}),
    ("controls.0.strength", {"strength": 1.0}),
]


def test_mistakes_are_told_before_anything_is_made(
    folders: dict[str, Path],
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(place)
    good = {"uri": "net-0", "image": "one.png"}
    whole = configured(folders["sdxl"], place, tmp_path / "out")
    cases = [(told, whole | {"controls": [good | wrong]}) for told, wrong in MISTAKES]
    lazy = {"steps": 4, "cache_interval": 2}
    cases.append(("controls and cache_interval", whole | {"controls": [good], "sampler": lazy}))
    for told, values in cases:
        (tmp_path / "job.yaml").write_text(yaml.safe_dump(values))
        assert main(["generate", str(tmp_path / "job.yaml")]) == 2
        said = capsys.readouterr().err.replace(f"{place}/", "")
        assert told in said, (told, said)
        assert not (tmp_path / "out").exists()
