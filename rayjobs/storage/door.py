"""The one door to bytes: local paths and `s3://`, with the same calls and the same errors.

Owns access and atomic creation. Endpoint and credentials come from the standard AWS variables.
Knows nothing of what the bytes mean.
"""

import contextlib
import os
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, TypeVar

import fsspec

from rayjobs.storage import local, patience, ranges, s3
from rayjobs.storage.patience import patient, translate_errors
from rayjobs.storage.places import absolute, is_remote
from rayjobs.storage.s3 import StorageError

CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 60
MAX_REMOVALS = 5
"""Of one folder, whose files others remove at the same time."""

T = TypeVar("T")


def num_retries() -> int:
    """How often this process has made a call again."""
    return patience.num_retries + ranges.num_retries


def check(uri: str, write: bool = False, timeout_s: float = s3.TIMEOUT_S) -> None:
    """Raise StorageError unless `uri`'s place can be reached, and written if asked, in time."""
    scheme = uri.split("://")[0] if is_remote(uri) else ""
    if scheme not in ("", "s3"):
        raise StorageError(f"{uri}: unknown kind of storage {scheme!r}; use a path or s3://")
    if scheme == "s3":
        s3.check(uri, write, timeout_s)
    elif write:
        local.check_writable(absolute(uri))


@patient
def exists(uri: str) -> bool:
    fs, path = open_fs(uri)
    with translate_errors(uri):
        fs.invalidate_cache()
        return bool(fs.exists(path))


@patient
def is_file(uri: str) -> bool:
    """Whether a file is there: on S3 by one request, where `exists` also lists for a folder."""
    fs, path = open_fs(uri)
    with translate_errors(uri):
        if not is_remote(uri):
            return os.path.isfile(path)
        bucket, _, key = path.partition("/")
        try:
            fs.call_s3("head_object", Bucket=bucket, Key=key)
        except FileNotFoundError:
            return False
        return True


@patient
def is_folder(uri: str) -> bool:
    fs, path = open_fs(uri)
    with translate_errors(uri):
        return bool(fs.isdir(path))


@patient
def list_files(uri: str) -> list[str]:
    """Paths of all files below `uri`, relative to it, sorted; none when there is no such folder."""
    path = open_fs(uri)[1]
    return sorted(os.path.relpath(name, path) for name in find(uri))


def find(uri: str) -> dict[str, dict[str, Any]]:
    """What is known of each file at or below `uri`, by its file system's own path."""
    fs, path = open_fs(uri)
    with translate_errors(uri):
        fs.invalidate_cache()
        found: dict[str, dict[str, Any]] = fs.find(path, detail=True)
    # Consoles make empty objects such as `photos/`, to show a folder that is not there.
    return {name: facts for name, facts in found.items() if not name.endswith("/")}


@patient
def list_folders(uri: str) -> list[str]:
    """Names of the folders right below `uri`, sorted; none when there is no such folder."""
    fs, path = open_fs(uri)
    with translate_errors(uri):
        fs.invalidate_cache()
        try:
            found = fs.ls(path, detail=True)
        except FileNotFoundError:
            return []
    return sorted(
        os.path.basename(e["name"].rstrip("/")) for e in found if e["type"] == "directory"
    )


def link(uri: str, seconds: int) -> str:
    """A URL by which anybody can read an object on S3 for so long."""
    fs, path = open_fs(uri)
    with translate_errors(uri):
        signed: str = fs.sign(path, expiration=seconds)
        return signed


@patient
def open_input(uri: str) -> IO[bytes]:
    """A seekable binary file for reading."""
    fs, path = open_fs(uri)
    with translate_errors(uri):
        file: IO[bytes] = fs.open(path, "rb")
        return file


@patient
def through(uri: str, read: Callable[[], T]) -> T:
    """`read()` on a file that `open_input` opened, with this door's errors and patience."""
    with translate_errors(uri):
        return read()


@patient
def read_bytes(uri: str) -> bytes:
    fs, path = open_fs(uri)
    with translate_errors(uri):
        data: bytes = fs.cat_file(path)
        return data


@patient
def write_bytes(uri: str, data: bytes, staging: str | None = None, durable: bool = True) -> None:
    """Replace whatever is at `uri`; a reader sees the old bytes or the new ones, never a part.

    `staging` is as for `create_bytes`; what is not `durable` need not outlive a power cut.
    """
    fs, path = open_fs(uri)
    with translate_errors(uri):
        if is_remote(uri):
            fs.pipe_file(path, data)
        else:
            local.write(path, data, staging, durable)


@patient
def create_bytes(uri: str, data: bytes, staging: str | None = None) -> bool:
    """Write `data` unless something is at `uri` already; then leave that and return False.

    Locally the bytes are first written in the folder `staging` of the same file system (else beside
    the file), so that a killed writer leaves nothing half done where others look.
    """
    fs, path = open_fs(uri)
    with translate_errors(uri):
        if not is_remote(uri):
            return local.create(path, data, staging)
        return s3.put_if(fs, path, data, IfNoneMatch="*")


@patient
def etag(uri: str) -> str | None:
    """A mark of the object's present state, for `replace_bytes`; None when nothing is there."""
    fs, path = open_fs(uri)
    with translate_errors(uri):
        if not is_remote(uri):
            return local.mark(path)
        try:
            return str(fs.info(path)["ETag"])
        except FileNotFoundError:
            return None


@patient
def replace_bytes(uri: str, data: bytes, mark: str, staging: str | None = None) -> bool:
    """Write `data` if the object is still in the state that `etag` told; else return False."""
    fs, path = open_fs(uri)
    with translate_errors(uri):
        if not is_remote(uri):
            return local.replace(path, data, mark, staging)
        # AWS and others write ETags in quotes; Ceph compares with the bare one.
        for written in dict.fromkeys((mark, mark.strip('"'))):
            if s3.put_if(fs, path, data, IfMatch=written):
                return True
        return False


@patient
def remove(uri: str) -> None:
    """Remove one file; nothing happens when it is not there."""
    fs, path = open_fs(uri)
    with translate_errors(uri), contextlib.suppress(FileNotFoundError):
        fs.rm_file(path)


@patient
def remove_files(folder: str, names: Iterable[str]) -> None:
    """Remove these files of a folder, on S3 a thousand with one request; they may not be there."""
    fs, path = open_fs(folder)
    paths = [f"{path}/{name}" for name in names]
    with translate_errors(folder):
        if is_remote(folder):
            s3.remove(fs, paths)
            return
        for each in paths:
            Path(each).unlink(missing_ok=True)


@patient
def remove_folder(uri: str) -> None:
    """Remove a folder and all in it; nothing happens when it is not there."""
    fs, path = open_fs(uri)
    with translate_errors(uri):
        if is_remote(uri):
            fs.invalidate_cache()
            s3.remove(fs, fs.find(path))
            return
        for attempt in range(MAX_REMOVALS):
            if not fs.exists(path):
                return
            try:
                fs.rm(path, recursive=True)
            except FileNotFoundError:  # a dying worker removes its files too
                if attempt == MAX_REMOVALS - 1:
                    raise


@patient
def put_file(uri: str, path: str | Path, staging: str | None = None) -> None:
    """Copy the local file at `path` to `uri`, replacing what is there."""
    fs, target = open_fs(uri)
    with translate_errors(uri):
        if is_remote(uri):
            fs.put_file(str(path), target)
        else:
            local.write(target, Path(path), staging)


@patient
def get_file(uri: str, path: str | Path) -> None:
    """Copy `uri` to the local file at `path`, whose folder is there."""
    fs, source = open_fs(uri)
    with translate_errors(uri):
        if is_remote(uri):
            ranges.download(uri, {source: (Path(path), fs.info(source))})
        else:
            fs.get_file(source, str(path))


@patient
def put_folder(uri: str, files: dict[str, bytes], staging: str) -> None:
    """Write a folder of files, by their names in it, replacing what is there.

    A local folder appears at once and whole; on S3 its objects appear in the order given.
    """
    fs, path = open_fs(uri)
    with translate_errors(uri):
        if is_remote(uri):
            for name, data in files.items():
                fs.pipe_file(f"{path}/{name}", data)
            fs.invalidate_cache()
            s3.remove(fs, [n for n in fs.find(path) if n.removeprefix(f"{path}/") not in files])
            return
        local.put_folder(path, files, staging)


def open_fs(uri: str) -> tuple[Any, str]:
    """The file system of a URI, and the path in it. Raises StorageError for an unknown kind."""
    if uri.startswith("s3://"):
        return _s3(), uri.removeprefix("s3://").rstrip("/")
    check(uri)
    return fsspec.filesystem("file"), absolute(uri)


def forget_connections() -> None:
    """Read the AWS variables again at the next call."""
    _s3.cache_clear()
    ranges.forget_connections()


@lru_cache(maxsize=1)
def _s3() -> Any:
    return fsspec.filesystem(
        "s3",
        skip_instance_cache=True,
        use_listings_cache=False,
        config_kwargs={"connect_timeout": CONNECT_TIMEOUT_S, "read_timeout": READ_TIMEOUT_S},
    )
