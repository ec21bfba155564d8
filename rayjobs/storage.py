"""The one door to bytes: local paths and `s3://`, with the same calls and the same errors.

Owns access, atomic creation and the copies of remote folders on this machine. Endpoint and
credentials come from the standard AWS variables. Knows nothing of what the bytes mean.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Generator
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import fsspec

CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 60
CHECK_TIMEOUT_S = 6


class StorageError(OSError):
    """A location cannot be used; the message names it, the reason and the way out."""


def join(uri: str, *parts: str) -> str:
    return "/".join([uri.rstrip("/"), *parts])


def is_remote(uri: str) -> bool:
    return "://" in uri and not uri.startswith("file://")


def absolute(uri: str) -> str:
    """The same place from any working directory: local paths made absolute, others as they are."""
    return uri if is_remote(uri) else os.path.abspath(uri.removeprefix("file://"))


def check(uri: str) -> None:
    """Raise StorageError within 15 seconds unless the place that `uri` lies in can be reached."""
    scheme = uri.split("://")[0] if is_remote(uri) else ""
    if scheme not in ("", "s3"):
        raise StorageError(f"{uri}: unknown kind of storage {scheme!r}; use a path or s3://")
    if scheme == "s3":
        _check_bucket(uri)


def exists(uri: str) -> bool:
    fs, path = _open(uri)
    with _told(uri):
        fs.invalidate_cache()
        return bool(fs.exists(path))


def is_folder(uri: str) -> bool:
    fs, path = _open(uri)
    with _told(uri):
        return bool(fs.isdir(path))


def list_files(uri: str) -> list[str]:
    """Paths of all files below `uri`, relative to it, sorted; none when there is no such folder."""
    fs, path = _open(uri)
    with _told(uri):
        fs.invalidate_cache()
        found = fs.find(path)
    return sorted(os.path.relpath(name, path) for name in found)


def open_input(uri: str) -> IO[bytes]:
    """A seekable binary file for reading."""
    fs, path = _open(uri)
    with _told(uri):
        file: IO[bytes] = fs.open(path, "rb")
        return file


def read_bytes(uri: str) -> bytes:
    fs, path = _open(uri)
    with _told(uri):
        data: bytes = fs.cat_file(path)
        return data


def write_bytes(uri: str, data: bytes, staging: str | None = None) -> None:
    """Replace whatever is at `uri`; a reader sees the old bytes or the new ones, never a part.

    `staging` is as for `create_bytes`.
    """
    fs, path = _open(uri)
    with _told(uri):
        if is_remote(uri):
            fs.pipe_file(path, data)
        else:
            with _beside(path, data, staging) as partial:
                os.replace(partial, path)


def create_bytes(uri: str, data: bytes, staging: str | None = None) -> bool:
    """Write `data` unless something is at `uri` already; then leave that and return False.

    Locally the bytes are first written in the folder `staging` of the same file system (else beside
    the file), so that a killed writer leaves nothing half done where others look.
    """
    fs, path = _open(uri)
    with _told(uri):
        if not is_remote(uri):
            return _create_local(path, data, staging)
        try:
            fs.pipe_file(path, data, mode="create")
        except FileExistsError:
            return False
        except OSError as error:
            # Ceph's answer to a failed If-None-Match reaches us as a plain OSError.
            if "PreconditionFailed" in repr(error) + repr(error.__cause__):
                return False
            raise
        return True


def remove_folder(uri: str) -> None:
    """Remove a folder and all in it; nothing happens when it is not there."""
    fs, path = _open(uri)
    with _told(uri):
        if fs.exists(path):
            fs.rm(path, recursive=True)


def put_file(path: str | Path, uri: str) -> None:
    """Copy the local file at `path` to `uri`, replacing what is there."""
    fs, target = _open(uri)
    with _told(uri):
        if is_remote(uri):
            fs.put_file(str(path), target)
        else:
            with _beside(target, Path(path).read_bytes()) as partial:
                os.replace(partial, target)


def fetch(uri: str) -> Path:
    """A local path with the content of `uri`: itself when local, else one copy for this machine.

    The copy is made under a lock, so that many workers fetch once, and has a name of its own for
    each state of the remote files (names, sizes, ETags), so that a changed model is fetched again.
    """
    if not is_remote(uri):
        return Path(uri.removeprefix("file://"))
    fs, path = _open(uri)
    with _told(uri):
        fs.invalidate_cache()
        found = fs.find(path, detail=True)
        if not found:
            raise StorageError(f"{uri}: nothing is there")
    state = sorted((name, info["size"], str(info.get("ETag"))) for name, info in found.items())
    key = hashlib.sha256(repr(state).encode()).hexdigest()[:32]
    cache = Path(os.environ.get("RAYJOBS_CACHE", Path.home() / ".cache" / "rayjobs"))
    target = cache / key
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            partial = Path(tempfile.mkdtemp(dir=cache))
            _download(fs, path, found, partial)
            partial.rename(target)
    return target / os.path.basename(path) if list(found) == [path] else target


def _download(fs: Any, root: str, found: dict[str, Any], folder: Path) -> None:
    for name, info in found.items():
        relative = os.path.basename(name) if name == root else os.path.relpath(name, root)
        local = folder / relative
        local.parent.mkdir(parents=True, exist_ok=True)
        with _told(name):
            fs.get_file(name, str(local))
        if local.stat().st_size != info["size"]:
            shutil.rmtree(folder)
            raise StorageError(f"{name}: got {local.stat().st_size} of {info['size']} bytes")


def _open(uri: str) -> tuple[Any, str]:
    if uri.startswith("s3://"):
        return _s3(), uri.removeprefix("s3://").rstrip("/")
    check(uri)
    return fsspec.filesystem("file"), os.path.abspath(uri.removeprefix("file://"))


def forget_connections() -> None:
    """Read the AWS variables again at the next call."""
    _s3.cache_clear()


@lru_cache(maxsize=1)
def _s3() -> Any:
    return fsspec.filesystem(
        "s3",
        skip_instance_cache=True,
        use_listings_cache=False,
        config_kwargs={"connect_timeout": CONNECT_TIMEOUT_S, "read_timeout": READ_TIMEOUT_S},
    )


@contextlib.contextmanager
def _beside(path: str, data: bytes, staging: str | None = None) -> Generator[str]:
    """A finished file that can be moved to `path`, gone afterwards if it was not."""
    folder = staging or os.path.dirname(path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    os.makedirs(folder, exist_ok=True)
    partial = os.path.join(folder, f"{os.path.basename(path)}.{uuid.uuid4().hex}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield partial
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(partial)


def _create_local(path: str, data: bytes, staging: str | None) -> bool:
    with _beside(path, data, staging) as partial:
        try:
            os.link(partial, path)  # unlike a rename, this fails when the name is taken
        except FileExistsError:
            return False
    return True


@contextlib.contextmanager
def _told(uri: str) -> Generator[None]:
    """Turn a file system's error into one that says what to do."""
    try:
        yield
    except (StorageError, FileExistsError):
        raise
    except FileNotFoundError as error:
        raise StorageError(f"{uri}: no such file, folder or bucket") from error
    except PermissionError as error:
        raise StorageError(f"{uri}: access denied; {_HOW_TO_ALLOW}") from error
    except OSError as error:
        raise StorageError(f"{uri}: {error}") from error
    except Exception as error:
        if type(error).__module__.startswith(("botocore", "aiobotocore", "aiohttp")):
            raise StorageError(f"{uri}: {error}") from error
        raise


_HOW_TO_ALLOW = (
    "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY and what they are allowed to do there"
)


def _check_bucket(uri: str) -> None:
    """Ask for one key of the bucket: a plain client gives up sooner and says more than s3fs."""
    import botocore.exceptions as s3_errors
    import botocore.session
    from botocore.config import Config

    bucket = uri.removeprefix("s3://").split("/")[0]
    timeouts = Config(
        connect_timeout=CHECK_TIMEOUT_S,
        read_timeout=CHECK_TIMEOUT_S,
        retries={"total_max_attempts": 1},
    )
    session = botocore.session.get_session()
    region = session.get_config_variable("region") or "us-east-1"
    try:
        client = session.create_client("s3", region_name=region, config=timeouts)
        client.list_objects_v2(Bucket=bucket, MaxKeys=1)
    except s3_errors.NoCredentialsError:
        raise StorageError(
            f"{uri}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        ) from None
    except s3_errors.ClientError as error:
        code = error.response.get("Error", {}).get("Code", "")
        reason = error.response.get("Error", {}).get("Message", "")
        if code in ("NoSuchBucket", "404"):
            raise StorageError(
                f"{uri}: bucket {bucket!r} does not exist; create it first"
            ) from None
        raise StorageError(f"{uri}: access refused ({code}: {reason}); {_HOW_TO_ALLOW}") from None
    except (s3_errors.BotoCoreError, s3_errors.HTTPClientError, ValueError) as error:
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        raise StorageError(
            f"{uri}: cannot reach {endpoint or 'S3'} ({type(error).__name__}); "
            "check the network and AWS_ENDPOINT_URL"
        ) from None
