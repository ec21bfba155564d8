"""Jobs whose pictures follow others: what records say of it, and which mistakes are told."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from rayjobs.cli import main
from rayjobs.dataset.manifest import Manifest
from rayjobs.dataset.records import conditioning
from rayjobs.generation import job
from rayjobs.generation.config import GenerateConfig
from rayjobs.generation.tools import export
from rayjobs.generation.tools.export_config import ExportConfig
from rayjobs.generation.tools.verify import verify

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
    (place / "taken.csv").write_text("prompt,conditioning_image\na red star,x\n")
    return place


def test_control_pictures_are_stored_beside_the_images(
    folders: dict[str, Path], place: Path, tmp_path: Path, in_process: None
) -> None:
    """As large as these, in data sets, exports and made again; ids and images do not change."""
    of_row = {"uri": str(place / "net-0"), "column": "outline"}
    of_all = {"uri": str(place / "net-1"), "image": str(place / "two.png")}
    values = configured(folders["sdxl"], place, tmp_path / "plain", of_row, of_all)
    plain = rows_of(values)
    values["output"] = {"uri": str(tmp_path / "set"), "control_images": True}
    rows = rows_of(values)
    assert [row["image_id"] for row in rows] == [row["image_id"] for row in plain]
    first, second = ([row[name] for row in rows] for name in conditioning(2))
    assert [each is not None for each in first] == [True, False, False]  # the third has failed
    assert [each is not None for each in second] == [True, True, False]
    size = (rows[0]["width"], rows[0]["height"])
    for one, name in ((first[0], "one.png"), (second[1], "two.png")):
        stored = Image.open(io.BytesIO(one["bytes"]))
        assert stored.size == size
        wanted = Image.open(place / name).resize(size, Image.Resampling.LANCZOS)
        assert stored.tobytes() == wanted.tobytes()
    assert verify(str(tmp_path / "set"), 3).faults == []
    small = size[0] // 2
    output = {"uri": str(tmp_path / "out"), "format": "webdataset", "size": small}
    export.run(str(tmp_path / "set"), ExportConfig.model_validate({"output": output}))
    for row in Manifest(str(tmp_path / "out"), "webdataset").format.read(
        str(tmp_path / "out" / "data"), 0
    ):
        sizes = {
            Image.open(io.BytesIO(row[name]["bytes"])).size
            for name in ("image", *conditioning(2))
            if row.get(name) is not None
        }
        assert sizes == {(small, small)}


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
    stored = whole["output"] | {"control_images": True}
    cases.append(("given without controls; leave it out", whole | {"output": stored}))
    named = {"uri": str(place / "taken.csv")}
    cases.append(
        (
            "makes a column conditioning_image, and",
            whole | {"controls": [good], "output": stored, "prompts": named},
        )
    )
    for told, values in cases:
        (tmp_path / "job.yaml").write_text(yaml.safe_dump(values))
        assert main(["generate", str(tmp_path / "job.yaml")]) == 2
        said = capsys.readouterr().err.replace(f"{place}/", "")
        assert told in said, (told, said)
        assert not (tmp_path / "out").exists()
