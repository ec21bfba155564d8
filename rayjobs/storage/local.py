"""Files on this machine: made whole or not at all.

Owns staging, creation once only and replacement of what has not changed. Knows no other storage.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
import uuid
from collections.abc import Generator
from pathlib import Path

from rayjobs.storage.s3 import StorageError

NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
"""What a file system without hard links, such as exFAT or many of FUSE's, says of one."""


@contextlib.contextmanager
def beside(
    path: str, data: bytes | Path, staging: str | None = None, durable: bool = True
) -> Generator[str]:
    """A finished file that can be moved to `path`, gone afterwards if it was not.

    Its bytes are given, or those of another file. Only a `durable` one is certain to outlive the
    machine's sudden end.
    """
    folder = staging or os.path.dirname(path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    os.makedirs(folder, exist_ok=True)
    partial = os.path.join(folder, f"{os.path.basename(path)}.{uuid.uuid4().hex}.partial")
    try:
        with open(partial, "wb") as file:
            if isinstance(data, bytes):
                file.write(data)
            else:
                with data.open("rb") as source:
                    shutil.copyfileobj(source, file)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        yield partial
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(partial)


def write(path: str, data: bytes | Path, staging: str | None, durable: bool = True) -> None:
    with beside(path, data, staging, durable) as partial:
        os.replace(partial, path)


def create(path: str, data: bytes, staging: str | None) -> bool:
    """False, and nothing changed, when the name is taken."""
    with beside(path, data, staging) as partial:
        try:
            os.link(partial, path)  # unlike a rename, this fails when the name is taken
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            return _rename_to_new(partial, path)
    return True


def _rename_to_new(source: str, path: str) -> bool:
    """As a hard link does it; of those who do this at the same time the first one counts."""
    with _locked(os.path.dirname(path)):
        if os.path.lexists(path):
            return False
        os.rename(source, path)
        return True


def mark(path: str) -> str | None:
    """What changes whenever the file is replaced; None when there is none."""
    try:
        info = os.stat(path)
    except FileNotFoundError:
        return None
    return f"{info.st_ino}-{info.st_mtime_ns}-{info.st_size}"


def replace(path: str, data: bytes, expected: str, staging: str | None) -> bool:
    """Replace a file whose `mark` is as expected; others who do this at the same time wait."""
    with _locked(os.path.dirname(path)):
        if mark(path) != expected:
            return False
        write(path, data, staging)
        return True


@contextlib.contextmanager
def _locked(folder: str) -> Generator[None]:
    opened = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)


def put_folder(path: str, files: dict[str, bytes], staging: str) -> None:
    """A folder with these files, which appears at once; one that was there is gone."""
    partial, old = Path(staging, uuid.uuid4().hex), Path(staging, uuid.uuid4().hex)
    partial.mkdir(parents=True)
    for name, data in files.items():
        (partial / name).write_bytes(data)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    while True:
        with contextlib.suppress(FileNotFoundError):
            os.rename(path, old)
        try:
            partial.rename(path)
            break
        except OSError as error:  # another writer's folder came between the two
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def check_writable(path: str) -> None:
    """Raise StorageError unless files can be made in the folder, or where it is to be made."""
    place = path
    while not os.path.exists(place):
        place = os.path.dirname(place)
    if not os.path.isdir(place):
        raise StorageError(f"{path}: {place} is a file, not a folder; choose another place")
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise StorageError(
            f"{path}: cannot write in {place}: {error.strerror}; choose another place"
        ) from None
