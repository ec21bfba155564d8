"""Copies of large objects: in ranges, once for a machine, whole or not at all."""

import hashlib
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import botocore.session
import pytest

from rayjobs import storage
from rayjobs.storage import StorageError, Unavailable, join, ranges

MB = 1 << 20
DATA = hashlib.shake_256(b"weights").digest(6 * MB + 5)


@pytest.fixture
def model(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder on S3 with an object put at once, one put in parts, a small and an empty one."""
    monkeypatch.setenv("RAYJOBS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(ranges, "RANGE_BYTES", MB)
    monkeypatch.setattr(ranges, "READ_BYTES", 100_000)
    monkeypatch.setattr(ranges.random, "uniform", lambda low, high: 0)
    uri = join(bucket, "model")
    storage.write_bytes(join(uri, "unet", "w"), DATA)
    storage.write_bytes(join(uri, "index"), b"{}")
    storage.write_bytes(join(uri, "empty"), b"")
    client = botocore.session.get_session().create_client("s3")
    place = {"Bucket": bucket.removeprefix("s3://"), "Key": "model/parts"}
    number = client.create_multipart_upload(**place)["UploadId"]
    parts = [
        {
            "PartNumber": part,
            "ETag": client.upload_part(**place, PartNumber=part, UploadId=number, Body=data)[
                "ETag"
            ],
        }
        for part, data in enumerate((DATA[: 5 * MB], DATA[5 * MB :]), 1)
    ]
    client.complete_multipart_upload(**place, UploadId=number, MultipartUpload={"Parts": parts})
    client.close()
    return uri


def cached(tmp_path: Path) -> list[str]:
    """What the cache holds beside its locks."""
    return [path.name for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]


def test_files_come_whole_and_checked(model: str) -> None:
    folder = storage.fetch(model)
    assert (folder / "unet" / "w").read_bytes() == DATA
    assert (folder / "parts").read_bytes() == DATA
    assert (folder / "index").read_bytes() == b"{}"
    assert (folder / "empty").read_bytes() == b""
    facts = {name.rpartition("/")[2]: each for name, each in storage.door.find(model).items()}
    for name, part_bytes in (("w", len(DATA)), ("parts", 5 * MB), ("empty", 1)):
        uri = join(model, "unet", "w") if name == "w" else join(model, name)
        etag = facts[name]["ETag"].strip('"')
        one = ranges._Object(uri, Path(), int(facts[name]["size"]), etag)
        assert ranges._part_bytes(one) == part_bytes, name


def test_many_at_once_fetch_once(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read, sizes = ranges._read, []

    def counted(each: Any, start: int, end: int) -> Iterator[bytes]:
        sizes.append(end - start)
        return read(each, start, end)

    monkeypatch.setattr(ranges, "_read", counted)
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(storage.fetch, [model] * 4))) == 1
    assert sum(sizes) == 2 * len(DATA) + 2
    assert max(sizes) == MB


def test_a_broken_connection_goes_on_where_it_broke(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, begun = ranges._read, []

    def broken(each: Any, start: int, end: int) -> Iterator[bytes]:
        begun.append(start)
        for number, data in enumerate(read(each, start, end)):
            if number == 3 and end == 2 * MB and len(begun) < 40:
                raise Unavailable("gone")
            yield data

    monkeypatch.setattr(ranges, "_read", broken)
    assert storage.fetch(join(model, "unet", "w")).read_bytes() == DATA
    assert {MB, MB + 300_000, MB + 600_000, MB + 900_000} <= set(begun)


def test_what_is_not_as_it_was_is_refused(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = ranges._read

    def flipped(each: Any, start: int, end: int) -> Iterator[bytes]:
        for data in read(each, start, end):
            yield bytes(len(data)) if start == 5 * MB else data

    with monkeypatch.context() as patch:
        patch.setattr(ranges, "_read", flipped)
        for name in ("unet/w", "parts"):
            with pytest.raises(StorageError, match=f"{name}: its bytes have the hash"):
                storage.fetch(join(model, name))

    def changed(each: Any, start: int, end: int) -> Iterator[bytes]:
        if start == 0 and each.uri.endswith("/w"):
            storage.write_bytes(each.uri, DATA[::-1])
        return read(each, start, end)

    with monkeypatch.context() as patch:
        patch.setattr(ranges, "_read", changed)
        # A stream that began before may find other bytes, and then it is their hash that tells.
        with pytest.raises(StorageError, match=r"w changed while it was|its bytes have the hash"):
            storage.fetch(model)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 9))
        with pytest.raises(StorageError, match=r"do not fit on the disk .* set RAYJOBS_CACHE"):
            storage.fetch(model)
    assert all(name.endswith(".partial") for name in cached(tmp_path))
    (folder,) = (storage.fetch(model),)
    assert (folder / "unet" / "w").read_bytes() == DATA[::-1]
    left = [name for name in cached(tmp_path) if name.startswith(folder.parent.name)]
    assert left == [folder.parent.name]


def test_the_rate_is_told(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ranges, "TOLD_BYTES", MB)
    storage.fetch(model)
    said = capsys.readouterr().err
    assert f"fetched {model}: 0.01 GB in " in said
    assert said.endswith(" GB/s\n")
