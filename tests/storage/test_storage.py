"""One door, two kinds of storage: the same tests on a local folder and on a real S3 server."""

import errno
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from botocore.exceptions import ClientError
from fsspec.implementations.local import LocalFileSystem
from s3fs.errors import translate_boto_error

from rayjobs import storage
from rayjobs.storage import StorageError, Unavailable, join, s3
from rayjobs.storage.patience import translate_errors
from tests.hosts.proxy import Proxy


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    local = request.param == "local"
    return str(tmp_path / "place") if local else request.getfixturevalue("bucket")


def test_bytes_come_back(place: str) -> None:
    uri = join(place, "a", "b.bin")
    assert not storage.exists(uri)
    storage.write_bytes(uri, b"one")
    storage.write_bytes(uri, b"two")
    assert storage.read_bytes(uri) == b"two"
    assert storage.list_files(place) == ["a/b.bin"]
    with storage.open_input(uri) as file:
        assert file.read() == b"two"


def test_created_once_only(place: str) -> None:
    uri, staging = join(place, "data", "x"), join(place, "tmp")
    assert storage.create_bytes(uri, b"first", staging)
    assert not storage.create_bytes(uri, b"second", staging)
    assert storage.read_bytes(uri) == b"first"
    assert storage.list_files(join(place, "data")) == ["x"]


def test_nothing_there_is_told(place: str) -> None:
    with pytest.raises(StorageError, match="no such file"):
        storage.read_bytes(join(place, "missing"))
    assert storage.list_files(join(place, "missing")) == []


def test_fetch_copies_once_and_again_when_changed(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYJOBS_CACHE", str(tmp_path / "cache"))
    uri = join(bucket, "model")
    storage.write_bytes(join(uri, "unet", "w"), b"weights")
    storage.write_bytes(join(uri, "index"), b"{}")
    first = storage.fetch(uri)
    assert (first / "unet" / "w").read_bytes() == b"weights"
    assert first.name == "model"
    assert storage.fetch(uri) == first
    storage.write_bytes(join(uri, "unet", "w"), b"others!")
    again = storage.fetch(uri)
    assert again != first
    assert (again / "unet" / "w").read_bytes() == b"others!"
    assert storage.fetch(join(uri, "index")).read_bytes() == b"{}"
    with pytest.raises(StorageError, match="nothing is there"):
        storage.fetch(join(bucket, "other"))
    assert storage.fetch(str(tmp_path)) == tmp_path


def test_unusable_storage_is_told_in_time(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.check(bucket)
    with pytest.raises(StorageError, match="bucket 'absent' does not exist"):
        storage.check("s3://absent/x")
    with pytest.raises(StorageError, match="unknown kind of storage 'ftp'"):
        storage.check("ftp://host/x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(StorageError, match=r"cannot reach http://127.0.0.1:9"):
        storage.check(bucket)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    with pytest.raises(StorageError, match=r"no credentials; .* IAM role .*instance profile"):
        storage.check(bucket)
    token = str(tmp_path / "token")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", token)
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::1:role/jobs")
    with pytest.raises(StorageError, match=rf"no credentials \(.*{token}.*\); .*IRSA"):
        storage.check(bucket)
    monkeypatch.delenv("AWS_WEB_IDENTITY_TOKEN_FILE")
    monkeypatch.setenv("AWS_PROFILE", "absent")
    with pytest.raises(StorageError, match=r"no credentials \(.*absent.*\); .*AWS_PROFILE"):
        storage.check(bucket)
    assert time.monotonic() - started < 15


@pytest.mark.parametrize(
    ("operation", "told"),
    [
        ("ListObjectsV2", r"access refused \(AccessDenied: no\); .*IAM role's of this machine"),
        ("AssumeRoleWithWebIdentity", r"IAM role \S*role/jobs may not be taken .* trust policy"),
    ],
)
def test_what_a_role_lacks_is_told(
    monkeypatch: pytest.MonkeyPatch, operation: str, told: str
) -> None:
    def refused() -> None:
        raise ClientError({"Error": {"Code": "AccessDenied", "Message": "no"}}, operation)

    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::1:role/jobs")
    with pytest.raises(StorageError, match=told):
        s3.asked("s3://here/x", refused)


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS])
def test_a_disk_without_hard_links(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """exFAT and FUSE: of many that create the same file one counts, and it is whole."""

    def refuse(*_: object) -> None:
        raise OSError(number, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    uri, staging = join(str(tmp_path), "manifest", "x"), join(str(tmp_path), "tmp")
    data = [bytes([n]) * 100_000 for n in range(16)]
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda mine: storage.create_bytes(uri, mine, staging), data))
    assert made.count(True) == 1
    assert storage.read_bytes(uri) == data[made.index(True)]
    assert storage.list_files(staging) == []


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for uri in ("~/a", "file://~/b"):
        storage.check(uri, write=True)
        storage.write_bytes(join(uri, "x"), b"1")
    assert storage.list_files(str(tmp_path)) == ["home/a/x", "home/b/x"]
    assert (
        storage.absolute_if_path("~/a") == str(tmp_path / "home" / "a") == storage.absolute("~/a")
    )
    assert storage.fetch("~/a/x").read_bytes() == b"1"
    assert storage.absolute("./~") == str(tmp_path / "~")
    assert storage.absolute_if_path("stabilityai/sdxl") == "stabilityai/sdxl"


@pytest.mark.parametrize("name", ["exp[12]", "exp*", "a+b & c#d%41 ü {x}"])
def test_names_are_no_patterns(place: str, name: str) -> None:
    """The first two would match the neighbours too, and not itself."""
    for folder in ("exp1", "exp2", name):
        for file in ("attempts/a[0].json", "attempts/b.json", "kept"):
            storage.write_bytes(join(place, folder, file), folder.encode())
    mine = join(place, name)
    assert storage.list_files(mine) == ["attempts/a[0].json", "attempts/b.json", "kept"]
    assert storage.list_folders(place) == sorted(["exp1", "exp2", name])
    assert storage.read_bytes(join(mine, "attempts", "a[0].json")) == name.encode()
    assert not storage.create_bytes(join(mine, "kept"), b"")
    assert storage.is_folder(mine)
    storage.remove(join(mine, "attempts", "a[0].json"))
    assert storage.list_files(join(mine, "attempts")) == ["b.json"]
    storage.remove_folder(join(mine, "attempts"))
    storage.remove_folder(join(mine, "attempts"))
    assert storage.list_files(mine) == ["kept"]
    storage.remove_folder(join(mine, "kept"))
    assert len(storage.list_files(place)) == 6


def test_empty_objects_that_show_a_folder_are_no_files(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYJOBS_CACHE", str(tmp_path / "cache"))
    fs, path = storage.door.open_fs(bucket)
    for key in ("photos/", "photos/sub/", "photos/a.png", "photos/sub/b.png"):
        fs.call_s3("put_object", Bucket=path, Key=key, Body=b"x" * (key[-1] != "/"))
    photos = join(bucket, "photos")
    before = storage.state(photos)
    assert storage.list_files(photos) == ["a.png", "sub/b.png"]
    assert (storage.list_folders(photos), storage.is_folder(photos)) == (["sub"], True)
    assert (storage.fetch(photos) / "sub" / "b.png").read_bytes() == b"x"
    fs.call_s3("delete_object", Bucket=path, Key="photos/")
    assert storage.state(photos) == before
    storage.remove_folder(photos)
    assert fs.find(path) == []


def test_a_folder_goes_though_others_remove_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write_bytes(join(str(tmp_path), "folder", "a"), b"one")
    calls = []

    def remove(path: str, **_: object) -> None:
        calls.append(path)
        shutil.rmtree(path)
        raise FileNotFoundError(path)

    monkeypatch.setattr(LocalFileSystem, "rm", lambda _, path, **rest: remove(path, **rest))
    storage.remove_folder(join(str(tmp_path), "folder"))
    assert calls
    assert not storage.exists(join(str(tmp_path), "folder"))


@pytest.mark.parametrize("code", ["InternalError", "500", "SlowDown", "ServiceUnavailable", "503"])
def test_a_server_that_asks_for_another_try_is_away(code: str) -> None:
    said = ClientError({"Error": {"Code": code, "Message": "try again"}}, "GetObject")
    with pytest.raises(Unavailable, match="try again"), translate_errors("s3://bucket/key"):
        raise translate_boto_error(said)


def test_a_busy_server_is_asked_again(
    bucket: str, s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "CHECK_PAUSE_S", 0.01)
    proxy = Proxy(s3_server, "127.0.0.1")
    proxy.start()
    try:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        proxy.refuse(2)
        storage.check(bucket, write=True)
        proxy.refuse(s3.CHECK_TRIES)
        with pytest.raises(Unavailable, match="SlowDown"):
            storage.check(bucket)
    finally:
        proxy.close()
