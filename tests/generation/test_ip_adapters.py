"""Jobs whose pictures refer to others: what records say of it, and which mistakes are told."""

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
ROWS = "prompt,style\na red star,one.png\na blue star,\na pink star,gone.png\n"


@pytest.fixture(scope="module")
def place(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, picture: Picture
) -> Path:
    """IP-Adapters with their encoder, pictures and prompts in one folder."""
    from tests.ip_adapters import save_encoder, save_ip_adapters

    place = tmp_path_factory.mktemp("references")
    save_ip_adapters(folders["sdxl"], place)
    save_ip_adapters(folders["sd"], place / "sd")
    save_encoder(place / "encoder")
    picture(1).save(place / "one.png")
    picture(2).save(place / "two.png")
    (place / "prompts.csv").write_text(ROWS)
    return place


def configured(model: Path, place: Path, output: Path, *uses: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": {"uri": str(model)},
        "prompts": {"uri": str(place / "prompts.csv")},
        "sampler": {"steps": 2, "guidance_scale": 3.0},
        "output": {"uri": str(output)},
        "engine": {"batch_size": 4},
        **({"ip_adapters": list(uses)} if uses else {}),
    }


def rows_of(values: dict[str, Any]) -> list[dict[str, Any]]:
    config = GenerateConfig.model_validate(values)
    job.run(config)
    assert job.run(config).num_made == 0
    manifest = Manifest(config.output.uri)
    return list(manifest.format.read(manifest.data, 0))


def test_rows_refer_to_their_own_pictures(
    folders: dict[str, Path], place: Path, tmp_path: Path, in_process: None
) -> None:
    """A row without one is the same as in a job without adapters, up to its hash."""
    encoder = str(place / "encoder")
    of_row = {"uri": str(place / "plain.safetensors"), "encoder": encoder, "column": "style"}
    of_all = {
        "uri": str(place / "plus.safetensors"),
        "encoder": encoder,
        "image": str(place / "two.png"),
        "scale": 0.7,
    }
    plain, some, both = (
        rows_of(configured(folders["sdxl"], place, tmp_path / name, *uses))
        for name, uses in (("plain", []), ("some", [of_row]), ("both", [of_row, of_all]))
    )
    assert [row["status"] for row in some] == ["ok", "ok", "failed"]
    assert some[2]["error"] == "reference image cannot be read: it is missing"
    assert [row["ip_adapter_images"] for row in some] == [["one.png"], [None], ["gone.png"]]
    assert both[1]["ip_adapter_images"] == [None, "two.png"]
    for key in ("image_id", "image_sha256"):
        assert plain[1][key] == some[1][key] != both[1][key]
        assert len({rows[0][key] for rows in (plain, some, both)}) == 3
    assert "ip_adapter_images" not in plain[0]


MISTAKES: list[tuple[str, dict[str, Any]]] = [
    ("ip_adapters.0: IP-Adapter plain.safetensors is not for", {"uri": "sd/plain.safetensors"}),
    ("ip_adapters.0: IP-Adapter nowhere does not exist", {"uri": "nowhere"}),
    ("ip_adapters.0: image encoder sd is a None", {"encoder": "sd"}),
    ("ip_adapters.0.encoder", {"encoder": None}),
    ("ip_adapters.0.image: reference image cannot be read", {"image": "prompts.csv"}),
    ("ip_adapters.0: give image, or column, and not both", {"column": "style"}),
    ("has no column 'look'; it has prompt, style", {"image": None, "column": "look"}),
    ("ip_adapters.0.scale", {"scale": float("inf")}),
    ("ip_adapters.0.start", {"start": 0.5}),
]


def test_mistakes_are_told_before_anything_is_made(
    folders: dict[str, Path],
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(place)
    good = {"uri": "plain.safetensors", "encoder": "encoder", "image": "one.png"}
    (place / "sd" / "config.json").write_text("{}")
    for told, wrong in MISTAKES:
        values = configured(folders["sdxl"], place, tmp_path / "out", good | wrong)
        (tmp_path / "job.yaml").write_text(yaml.safe_dump(values))
        assert main(["generate", str(tmp_path / "job.yaml")]) == 2
        said = capsys.readouterr().err.replace(f"{place}/", "")
        assert told in said, (told, said)
        assert not (tmp_path / "out").exists()
