"""Damage of every kind: each is found, and made good by the command that verify names."""

import hashlib
import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rayjobs import cli, storage
from rayjobs.config import BadInput
from rayjobs.dataset import manifest as manifests
from rayjobs.dataset.manifest import Damaged, Manifest
from rayjobs.generation import job
from rayjobs.generation.config import GenerateConfig
from rayjobs.generation.spec import draft, origin
from rayjobs.generation.tools.verify import verify

pytestmark = pytest.mark.model

Damage = tuple[Callable[[Path], Any], str]
NUM_SHARDS = 6


def delete(name: str) -> Callable[[Path], Any]:
    return lambda root: (root / name).unlink()


def cut(name: str) -> Callable[[Path], Any]:
    return lambda root: (root / name).write_bytes((root / name).read_bytes()[:-100])


def flip(name: str, at: int) -> Callable[[Path], Any]:
    def change(root: Path) -> None:
        data = bytearray((root / name).read_bytes())
        data[at] ^= 1
        (root / name).write_bytes(data)

    return change


def copy(name: str, to: str) -> Callable[[Path], Any]:
    return lambda root: shutil.copy(root / name, root / to)


def change(name: str, **values: Any) -> Callable[[Path], Any]:
    """Of an entry."""

    def write(root: Path) -> None:
        entry = json.loads((root / name).read_text()) | values
        (root / name).write_text(json.dumps(entry))

    return write


def of_another_job(root: Path) -> None:
    """Shard 4 and its entry are those of a job with another prompt."""
    shard, entry = root / "data/shard-00000004.parquet", root / "manifest/00000004.json"
    table = pq.read_table(shard)
    at = table.schema.get_field_index("prompt")
    prompts = pa.array(["a blue star"] * len(table))
    pq.write_table(table.set_column(at, "prompt", prompts), shard)
    change(entry.name, sha256=hashlib.sha256(shard.read_bytes()).hexdigest())(entry.parent)


def empty(name: str) -> Callable[[Path], Any]:
    return lambda root: (root / name).write_bytes(b"")


BESIDE: list[Damage] = [
    (delete("README.md"), "README.md is missing"),
    (delete("prompts/segment-000.parquet"), "prompts/segment-000.parquet is missing"),
    (
        copy("prompts/segment-001.parquet", "prompts/segment-001-init.parquet"),
        "prompts/segment-001-init.parquet is not what the job was begun with",
    ),
    (cut("prompts/segment-001.parquet"), "prompts/segment-001.parquet is not what"),
]
DAMAGES: dict[str, list[Damage]] = {
    "parquet": [
        (delete("data/shard-00000000.parquet"), "shard 0: data/shard-00000000.parquet is missing"),
        (cut("data/shard-00000002.parquet"), "shard 2: cannot be read on after record -"),
        (flip("data/shard-00000003.parquet", 3000), "shard 3: data/shard-00000003.parquet has SHA"),
        (empty("manifest/00000005.json"), "manifest/00000005.json: cannot be read"),
        (of_another_job, "record 8: has the prompt 'a blue star', where the job has 'a red star'"),
        *BESIDE,
    ],
    "webdataset": [
        (cut("manifest/compact-00000000.parquet"), "compact-00000000.parquet: cannot be"),
        (cut("data/shard-00000004.tar"), "shard 4: "),
        (
            copy("manifest/00000004.json", "manifest/00000005.json"),
            "manifest/00000005.json: cannot",
        ),
    ],
    "folder": [
        (
            delete("data/shard-00000000/000000000001.png"),
            "shard 0: cannot be read on after record 0",
        ),
        (
            lambda root: shutil.rmtree(root / "data/shard-00000001"),
            "data/shard-00000001 is missing",
        ),
        (cut("data/shard-00000002/metadata.jsonl"), "shard 2: cannot be read"),
        (
            copy("data/shard-00000003/000000000006.png", "data/shard-00000003/000000000099.png"),
            "shard 3: data/shard-00000003 has SHA-256",
        ),
        (
            copy("data/shard-00000004/000000000008.png", "data/shard-00000004/000000000009.png"),
            "shard 4, record 9: the picture is not the one that was made",
        ),
    ],
}


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards 0 to 3 have a compact file, the last two an entry of their own."""
    monkeypatch.setattr(manifests, "GROUP", 4)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return cache(lambda form: make(tmp_path_factory.mktemp(form), form))


@pytest.fixture
def whole(sources: Callable[[str], Path], tmp_path: Path, in_process: None) -> Callable[[str], str]:
    """The URI of a whole data set of that format, to be damaged."""
    return lambda form: str(shutil.copytree(sources(form), tmp_path / "out"))


def make(folder: Path, form: str) -> Path:
    """A data set of two jobs, the second one from pictures: 12 records in 6 shards."""
    pictures = folder / "pictures"
    pictures.mkdir()
    for colour in ("red", "blue"):
        Image.new("RGB", (64, 64), colour).save(pictures / f"{colour}.png")
    values: dict[str, Any] = {
        "model": {"uri": "starter"},
        "prompts": {"inline": ["a red star"]},
        "seeds": {"count": 8},
        "sampler": {"name": "euler", "steps": 2, "guidance_scale": 1.0},
        "output": {"uri": str(folder / "out"), "format": form, "images_per_shard": 2},
        "engine": {"batch_size": 4},
    }
    job.run(GenerateConfig.model_validate(values))
    values |= {"init": {"uri": str(pictures)}, "seeds": {"count": 2}}
    job.run(GenerateConfig.model_validate(values), extend=True)
    return folder / "out"


def data(uri: str) -> dict[str, bytes]:
    names = storage.list_files(f"{uri}/data")
    return {name: storage.read_bytes(f"{uri}/data/{name}") for name in names}


@pytest.mark.parametrize("form", DAMAGES)
def test_each_damage_is_found_and_repaired(
    form: str, whole: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    uri = whole(form)
    root, before = Path(uri), data(uri)
    (root / "data" / ".DS_Store").write_bytes(b"x")
    if form == "folder":
        (root / "data" / "shard-00000005" / "Thumbs.db").write_bytes(b"x")
    assert verify(uri).faults == []
    for damage, text in DAMAGES[form]:
        damage(root)
        faults = verify(uri).faults
        assert any(text in fault for fault in faults), (text, faults)
    assert cli.main(["verify", uri]) == 3
    assert f"to make it whole again: rayjobs repair {uri}" in capsys.readouterr().out
    assert cli.main(["repair", uri]) == 0
    assert verify(uri, regenerate=3).faults == []
    assert {n: d for n, d in data(uri).items() if n[0] != "." and "Thumbs" not in n} == before
    assert job.repair(uri, []).num_made == 0
    assert not (root / "attempts").exists()


def test_an_entry_that_no_worker_wrote_is_found_and_repaired(whole: Callable[[str], str]) -> None:
    uri, name = whole("parquet"), "manifest/00000005.json"
    root, before = Path(uri), data(uri)
    for values in (
        *({"file": "../../etc/passwd"}, {"file": "data/shard-00000004.parquet"}),
        *({"rows": None}, {"rows": "2"}, {"sha256": None}, {"failed": 7}, {"generation": -1}),
    ):
        change(name, **values)(root)
        assert verify(uri).faults == [f"{name}: cannot be read"]
    assert job.repair(uri, []).num_made == 2
    for values, text in (
        ({"failed": 1}, "shard 5: holds 0 failed records, not 1"),
        ({"rows": 0}, "shard 5: holds 2 records, not 0"),
    ):
        change(name, **values)(root)
        assert verify(uri).faults == [text]
        assert job.repair(uri, []).num_made == 2
    assert (verify(uri).faults, data(uri)) == ([], before)


def test_what_cannot_be_repaired_is_told(
    whole: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = whole("parquet")
    root = Path(uri)
    config = GenerateConfig.model_validate(
        {"model": {"uri": "starter"}, "prompts": {"inline": ["x"]}, "output": {"uri": uri}}
    )
    (root / "data" / "notes.parquet").write_bytes(b"x")
    assert verify(uri).faults == [
        "data/notes.parquet: is of no shard, but others would read it; remove it"
    ]
    (root / "manifest" / "00000004.json").write_bytes(b"[]")
    with pytest.raises(Damaged, match=r"manifest/00000004.json is damaged; `rayjobs verify .*out`"):
        job.make_again(config, job.read_lock(uri), {4: {}})  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="would change what is made"):
        job.repair(uri, ["sampler.steps=3"])
    monkeypatch.setattr(draft, "list_pictures", lambda uri: ["another.png"])
    (root / "prompts" / "segment-001-init.parquet").unlink()
    with pytest.raises(BadInput, match=r"cannot be made again: init\.uri, .*, is not what it was"):
        job.repair(uri, [])
    (root / "spec.lock.json").write_bytes(b"{")
    with pytest.raises(BadInput, match=r"cannot be read.*; put it back from a copy"):
        verify(uri)


def test_a_storage_that_is_away_blames_no_shard(
    whole: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_away(*_: Any) -> None:
        raise storage.Unavailable("s3://bucket/set: does not answer")

    monkeypatch.setattr(origin, "open_spec", is_away)
    with pytest.raises(storage.Unavailable):
        verify(whole("parquet"))


def test_a_run_says_what_is_damaged(whole: Callable[[str], str]) -> None:
    uri = whole("parquet")
    config = job.config_again(uri, job.read_lock(uri), -1)  # type: ignore[arg-type]
    (Path(uri) / "data" / "shard-00000001.parquet").unlink()
    with pytest.raises(BadInput, match=f"a shard is damaged: .*`rayjobs repair {uri}` makes it"):
        job.run(config)
    assert job.repair(uri, ["workers.min=1"]).num_made == 2
    shutil.copy(f"{uri}/prompts/segment-000.parquet", f"{uri}/prompts/segment-001.parquet")
    assert job.run(config).num_made == 0  # the same prompt in both
    (Path(uri) / "prompts" / "segment-000.parquet").write_bytes(b"PAR1")
    with pytest.raises(BadInput, match=r"segment-000.parquet is not what .*`rayjobs repair"):
        job.run(config)


def test_an_export_is_verified_and_repaired(
    whole: Callable[[str], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri, out = whole("parquet"), str(tmp_path / "exported")
    command = ["export", uri, f"output.uri={out}", "output.format=folder", "where=seed in 0, 3"]
    assert cli.main([*command, "columns=seed"]) == 0
    before = data(out)
    assert cli.main(["verify", out]) == 0
    lost = next(name for name in before if name.endswith("png"))
    delete(f"data/{lost}")(Path(out))
    empty("manifest/00000005.json")(Path(out))
    delete("README.md")(Path(out))
    assert len(verify(out).faults) == 4
    capsys.readouterr()
    assert cli.main(["verify", out]) == 3
    assert "the same `rayjobs export` command with --repair" in capsys.readouterr().out
    assert cli.main([*command, "--repair", "columns=seed"]) == 0
    assert (verify(out).faults, data(out)) == ([], before)
    with pytest.raises(BadInput, match="is it an export"):
        job.repair(out, [])


def test_a_replaced_folder_on_s3_keeps_no_old_picture(bucket: str) -> None:
    manifest, facts = Manifest(bucket, "folder"), {"rows": 1, "failed": 0}
    name = manifest.format.name(0)
    old = manifest.commit(0, {f"{name}/1.png": b"a", f"{name}/metadata.jsonl": b"b"}, facts)
    new = manifest.replace(old, {f"{name}/metadata.jsonl": b"c"}, facts)
    assert manifest.sha256(0) == new["sha256"]
