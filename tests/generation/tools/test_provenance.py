"""Marked data sets and signed exports: what they carry, and what `verify` says without it."""

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from rayjobs import cli
from rayjobs.config import BadInput
from rayjobs.dataset.lock import read_lock
from rayjobs.dataset.manifest import Manifest
from rayjobs.dataset.records import Row
from rayjobs.generation import job
from rayjobs.generation.config import GenerateConfig
from rayjobs.generation.spec.lock import data_set_schema
from rayjobs.generation.tools import export
from rayjobs.generation.tools.export_config import ExportConfig
from rayjobs.generation.tools.verify import verify
from rayjobs.generation.worker.shards import ShardWorker
from rayjobs.images import watermark
from rayjobs.images.credentials import Signing
from rayjobs.images.encode import encode_picture
from tests.chain import make_chain

pytestmark = pytest.mark.model


def generate(uri: Path, **output: Any) -> str:
    values: dict[str, Any] = {
        "model": {"uri": "starter"},
        "prompts": {"templates": ["a {colour} star"], "axes": {"colour": ["red", "blue"]}},
        "sampler": {"name": "euler", "steps": 2, "guidance_scale": 1.0},
        "output": {"uri": str(uri)} | output,
        "engine": {"batch_size": 2},
    }
    config = GenerateConfig.model_validate(values)
    list(ShardWorker(config, job.prepare(config)).make([0]))
    return str(uri)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> str:
    return generate(tmp_path_factory.mktemp("plain") / "out")


def rows(uri: str) -> list[Row]:
    manifest = Manifest(uri)
    return list(manifest.format.read(manifest.data, 0))


def replace_picture(uri: str, schema_of: str, data: bytes) -> None:
    """Put another picture into the first record, with hashes that say so nowhere."""
    lock, manifest = read_lock(schema_of), Manifest(uri)
    assert lock is not None
    found, old = rows(uri), manifest.entry(0)
    assert old is not None
    found[0]["image"], found[0]["image_sha256"] = {"bytes": data, "path": None}, None
    files = manifest.format.encode(0, found, data_set_schema(schema_of, lock))
    facts = {k: old[k] for k in old.keys() - {"shard", "generation", "file", "sha256", "bytes"}}
    manifest.replace(old, files, facts)


def picture(row: Row) -> Image.Image:
    return Image.open(io.BytesIO(row["image"]["bytes"]))


def test_a_marked_data_set(plain: str, tmp_path: Path) -> None:
    marked = generate(tmp_path / "marked", provenance={"watermark": True})
    again = generate(tmp_path / "again", provenance={"watermark": True})
    assert [r["image_sha256"] for r in rows(marked)] == [r["image_sha256"] for r in rows(again)]
    assert all(watermark.read(picture(row)) == row["image_id"][:16] for row in rows(marked))
    assert not {r["image_id"] for r in rows(marked)} & {r["image_id"] for r in rows(plain)}
    assert not any(watermark.read(picture(row)) for row in rows(plain))
    assert verify(marked, regenerate=1).faults == verify(plain).faults == []
    replace_picture(marked, marked, rows(plain)[0]["image"]["bytes"])
    assert verify(marked).faults == [
        "shard 0, record 0: the picture has no watermark; it was stripped, cropped or changed"
    ]
    replace_picture(marked, marked, rows(again)[1]["image"]["bytes"])
    (fault,) = verify(marked).faults
    assert rows(again)[1]["image_id"][:16] in fault


def test_a_signed_export(plain: str, tmp_path: Path) -> None:
    provenance = {"watermark": True, **make_chain().write(tmp_path)}
    output = {"uri": str(tmp_path / "out"), "image_format": "webp", "provenance": provenance}
    config = ExportConfig.model_validate({"output": output | {"size": 256}})
    assert export.run(plain, config).num_records == 2
    uri = config.output.uri
    assert all(watermark.read(picture(row)) == row["image_id"][:16] for row in rows(uri))
    assert verify(uri).faults == []
    stripped = encode_picture(picture(rows(uri)[0]), "png", 90)
    swapped = rows(uri)[1]["image"]["bytes"]
    for data, named in ((stripped, "no content credentials"), (swapped, "of another one")):
        replace_picture(uri, plain, data)
        assert named in verify(uri).faults[-1]
        assert verify(uri).num_records == 2


def test_a_key_that_is_not_there_is_named(plain: str, tmp_path: Path) -> None:
    keys = make_chain().write(tmp_path) | {"key": str(tmp_path / "none.pem")}
    output = {"uri": str(tmp_path / "out"), "provenance": keys}
    with pytest.raises(BadInput, match=r"none\.pem does not exist"):
        export.run(plain, ExportConfig.model_validate({"output": output}))
    with pytest.raises(ValueError, match="certificates and key go together"):
        ExportConfig.model_validate({"output": output | {"provenance": {"key": keys["key"]}}})


def test_a_picture_alone(plain: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chain, row = make_chain(), rows(plain)[0]
    bare, signed = tmp_path / "bare.png", tmp_path / "signed.png"
    bare.write_bytes(row["image"]["bytes"])
    marked = encode_picture(watermark.mark(picture(row), row["image_id"]), "png", 90)
    named = {"image_id": row["image_id"]}
    signed.write_bytes(Signing(chain.certificates, chain.key).sign(marked, "png", named))
    (tmp_path / "issuer.pem").write_bytes(chain.issuer)
    assert cli.main(["verify", str(bare)]) == 3
    assert capsys.readouterr().out == "watermark: none\ncredentials: none\n"
    assert cli.main(["verify", str(signed), "--trust", str(tmp_path / "issuer.pem")]) == 0
    said = capsys.readouterr().out
    assert f"begins with {row['image_id'][:16]}" in said
    assert f"valid, signed by operator, trusted, image_id {row['image_id']}" in said
