"""The one door to bytes: local paths and `s3://`, with the same calls and the same errors.

Owns access, atomic creation and patience with a server that is away. Endpoint and credentials come
from the standard AWS variables. Knows nothing of what the bytes mean.
"""

import contextlib
import errno
import logging
import os
import time
from collections.abc import Callable, Generator, Iterable
from functools import lru_cache, wraps
from pathlib import Path
from typing import IO, Any, Concatenate, ParamSpec, TypeVar

import fsspec

from rayjobs.storage import local, ranges, s3
from rayjobs.storage.s3 import HOW_TO_ALLOW, NotThere, StorageError, Unavailable

CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 60
LONGEST_WAIT_S = 15.0
MAX_REMOVALS = 5
"""Of one folder, whose files others remove at the same time."""
_AWAY = (errno.EIO, errno.EBUSY, errno.ETIMEDOUT, errno.ECONNREFUSED, errno.ECONNRESET)
_patience_s = 0.0
_num_retries = 0

P = ParamSpec("P")
T = TypeVar("T")


def be_patient(seconds: float) -> None:
    """From now on every call of this process waits this long for a server that is away."""
    global _patience_s
    _patience_s = seconds


def num_retries() -> int:
    """How often this process has made a call again."""
    return _num_retries + ranges.num_retries


def _patient(call: Callable[Concatenate[str, P], T]) -> Callable[Concatenate[str, P], T]:
    """The call, made again with growing pauses while the storage is Unavailable."""

    @wraps(call)
    def wait_for(uri: str, /, *args: P.args, **kwargs: P.kwargs) -> T:
        deadline, wait_s = time.monotonic() + _patience_s, 0.5
        while True:
            try:
                return call(uri, *args, **kwargs)
            except Unavailable as error:
                if time.monotonic() + wait_s > deadline:
                    raise
                logging.getLogger("rayjobs").warning("%s; waiting for it", error)
            global _num_retries
            _num_retries += 1
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)

    return wait_for


def join(uri: str, *parts: str) -> str:
    return "/".join([uri.rstrip("/"), *parts])


def is_remote(uri: str) -> bool:
    return "://" in uri and not uri.startswith("file://")


def absolute(uri: str) -> str:
    """The same place from any working directory: local paths made absolute, others as they are.

    `~` is the home folder, which a shell does not write out in `output.uri=~/images`.
    """
    if is_remote(uri):
        return uri
    return os.path.abspath(os.path.expanduser(uri.removeprefix("file://")))


def absolute_if_path(uri: str) -> str:
    """As `absolute`, but what is no existing path, such as a hub id or `starter`, stays."""
    return absolute(uri) if not is_remote(uri) and os.path.exists(absolute(uri)) else uri


def check(uri: str, write: bool = False, timeout_s: float = s3.TIMEOUT_S) -> None:
    """Raise StorageError unless `uri`'s place can be reached, and written if asked, in time."""
    scheme = uri.split("://")[0] if is_remote(uri) else ""
    if scheme not in ("", "s3"):
        raise StorageError(f"{uri}: unknown kind of storage {scheme!r}; use a path or s3://")
    if scheme == "s3":
        s3.check(uri, write, timeout_s)
    elif write:
        local.check_writable(absolute(uri))


@_patient
def exists(uri: str) -> bool:
    fs, path = open_fs(uri)
    with translate_errors(uri):
        fs.invalidate_cache()
        return bool(fs.exists(path))


@_patient
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


@_patient
def is_folder(uri: str) -> bool:
    fs, path = open_fs(uri)
    with translate_errors(uri):
        return bool(fs.isdir(path))


@_patient
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


@_patient
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


@_patient
def open_input(uri: str) -> IO[bytes]:
    """A seekable binary file for reading."""
    fs, path = open_fs(uri)
    with translate_errors(uri):
        file: IO[bytes] = fs.open(path, "rb")
        return file


@_patient
def through(uri: str, read: Callable[[], T]) -> T:
    """`read()` on a file that `open_input` opened, with this door's errors and patience."""
    with translate_errors(uri):
        return read()


@_patient
def read_bytes(uri: str) -> bytes:
    fs, path = open_fs(uri)
    with translate_errors(uri):
        data: bytes = fs.cat_file(path)
        return data


@_patient
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


@_patient
def create_bytes(uri: str, data: bytes, staging: str | None = None) -> bool:
    """Write `data` unless something is at `uri` already; then leave that and return False.

    Locally the bytes are first written in the folder `staging` of the same file system (else beside
    the file), so that a killed writer leaves nothing half done where others look.
    """
    fs, path = open_fs(uri)
    with translate_errors(uri):
        if not is_remote(uri):
            return local.create(path, data, staging)
        return _put_if(fs, path, data, IfNoneMatch="*")


@_patient
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


@_patient
def replace_bytes(uri: str, data: bytes, mark: str, staging: str | None = None) -> bool:
    """Write `data` if the object is still in the state that `etag` told; else return False."""
    fs, path = open_fs(uri)
    with translate_errors(uri):
        if not is_remote(uri):
            return local.replace(path, data, mark, staging)
        # AWS and others write ETags in quotes; Ceph compares with the bare one.
        for written in dict.fromkeys((mark, mark.strip('"'))):
            if _put_if(fs, path, data, IfMatch=written):
                return True
        return False


@_patient
def remove(uri: str) -> None:
    """Remove one file; nothing happens when it is not there."""
    fs, path = open_fs(uri)
    with translate_errors(uri), contextlib.suppress(FileNotFoundError):
        fs.rm_file(path)


@_patient
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


@_patient
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


@_patient
def put_file(uri: str, path: str | Path, staging: str | None = None) -> None:
    """Copy the local file at `path` to `uri`, replacing what is there."""
    fs, target = open_fs(uri)
    with translate_errors(uri):
        if is_remote(uri):
            fs.put_file(str(path), target)
        else:
            local.write(target, Path(path), staging)


@_patient
def get_file(uri: str, path: str | Path) -> None:
    """Copy `uri` to the local file at `path`, whose folder is there."""
    fs, source = open_fs(uri)
    with translate_errors(uri):
        if is_remote(uri):
            ranges.download(uri, {source: (Path(path), fs.info(source))})
        else:
            fs.get_file(source, str(path))


@_patient
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


@contextlib.contextmanager
def translate_errors(uri: str) -> Generator[None]:
    """Turn a file system's error into one that says what to do."""
    try:
        yield
    except (StorageError, FileExistsError):
        raise
    except FileNotFoundError as error:
        raise NotThere(f"{uri}: no such file, folder or bucket") from error
    except PermissionError as error:
        way_out = HOW_TO_ALLOW if is_remote(uri) else "change its owner or mode, or use another"
        raise StorageError(f"{uri}: access denied; {way_out}") from error
    except OSError as error:
        if is_remote(uri) and error.errno in _AWAY:
            raise Unavailable(f"{uri}: {error}") from error
        raise StorageError(f"{uri}: {error.strerror or error}") from error
    except Exception as error:
        if type(error).__module__.startswith(("botocore", "aiobotocore", "aiohttp")):
            raise Unavailable(f"{uri}: {error}") from error
        raise


def _put_if(fs: Any, path: str, data: bytes, **condition: str) -> bool:
    """Put an object on a condition, in one part: not all servers take one for the last of many.

    What is there already and equal counts as put: the answer to an earlier try may have been lost.
    """
    place, _, key = path.partition("/")
    for pause_s in (0.2, 1.0, 5.0, None):
        try:
            fs.call_s3("put_object", Bucket=place, Key=key, Body=data, **condition)
            return True
        except OSError as error:
            # s3fs tells a failed condition by a plain OSError, or by FileExistsError.
            told = repr(error) + repr(error.__cause__)
            if "ConditionalRequestConflict" in told and pause_s is not None:
                time.sleep(pause_s)  # two at the same moment: nobody may have won
                continue
            absent = "IfMatch" in condition and "NoSuchKey" in told
            unmet = isinstance(error, FileExistsError) or "PreconditionFailed" in told
            if not (absent or unmet or "At least one of the pre-conditions" in told):
                raise
            return "IfMatch" in condition and _holds(fs, path, data)
    return False


def _holds(fs: Any, path: str, data: bytes) -> bool:
    try:
        return bool(fs.cat_file(path) == data)
    except FileNotFoundError:
        return False
