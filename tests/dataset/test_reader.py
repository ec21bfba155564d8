"""What counts as a data set: the manifest decides, not the files that lie in the folder."""

import shutil
from pathlib import Path

import pytest

from rayjobs.config import BadInput
from rayjobs.dataset.formats import FORMATS
from rayjobs.dataset.lock import Lock, Segment, create_lock
from rayjobs.dataset.manifest import Manifest
from rayjobs.dataset.reader import Reader
from rayjobs.dataset.records import COLUMNS, schema

PNG = b"\x89PNG\r\n\x1a\n"


def shard(output_format: str, number: int) -> dict[str, bytes]:
    """The files of a shard of three records, one of them failed."""
    rows = [
        dict.fromkeys(COLUMNS)
        | {
            "record": 3 * number + place,
            "prompt": f"prompt {place}",
            "status": "failed" if place == 1 else "ok",
            "image": None if place == 1 else {"bytes": PNG, "path": None},
        }
        for place in range(3)
    ]
    return FORMATS[output_format].encode(number, rows, schema())


@pytest.fixture(params=["parquet", "webdataset", "folder"])
def data_set(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Shards 0 and 1 are committed; of shard 2 only the data is there."""
    segment = Segment(
        job={"output": {"format": request.param}},
        prompts_sha256="",
        num_prompts=9,
        model_name="starter",
        model_sha256="",
        guided=True,
        num_records=9,
        num_shards=3,
    )
    uri = str(tmp_path / "data-set")
    assert create_lock(Lock(segments=(segment,), determinism={}), uri)
    manifest = Manifest(uri, request.param)
    for number in (1, 0):
        manifest.commit(number, shard(request.param, number), {"rows": 3, "failed": 1})
    for name, data in shard(request.param, 2).items():
        path = Path(uri, "data", name)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    return uri


def test_an_uncommitted_shard_is_not_read(data_set: str) -> None:
    reader = Reader(data_set)
    assert [entry["shard"] for entry in reader.entries] == [0, 1]
    assert reader.num_committed == 6
    rows = list(reader.read(["record", "status"]))
    assert [row["record"] for row in rows] == [0, 1, 2, 3, 4, 5]
    assert [row["status"] for row in rows] == ["ok", "failed", "ok"] * 2


def test_pictures_are_read_when_asked_for(data_set: str) -> None:
    images = [row["image"] for row in Reader(data_set).read(["image"])]
    assert [image and image["bytes"] for image in images] == [PNG, None, PNG] * 2


def test_a_folder_without_a_manifest_is_refused(data_set: str) -> None:
    shutil.rmtree(Path(data_set, "manifest"))
    assert Reader(data_set).num_committed == 0
    with pytest.raises(BadInput, match="its manifest names no finished shard"):
        list(Reader(data_set).read())


def test_a_folder_without_a_lock_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"is not a data set: it has no spec\.lock\.json"):
        Reader(str(tmp_path))
