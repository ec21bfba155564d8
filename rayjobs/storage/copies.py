"""What lies on storage as files of this machine: one copy for all its processes.

Owns the copies of remote files and folders, named by the state of what they copy. Knows nothing of
what the bytes mean.
"""

import fcntl
import hashlib
import os
import shutil
from pathlib import Path

from rayjobs.storage import ranges
from rayjobs.storage.door import find, open_fs
from rayjobs.storage.places import is_remote
from rayjobs.storage.s3 import StorageError


def cache_folder() -> Path:
    """Where this machine keeps what it can do without."""
    return Path(os.environ.get("RAYJOBS_CACHE", Path.home() / ".cache" / "rayjobs"))


def to_local(uri: str) -> str:
    """What a library can load: what is on S3 as a local path, fetched first; all else as it is."""
    return str(fetch(uri)) if is_remote(uri) else uri


def state(uri: str) -> str:
    """A mark of a source's present state: it changes when the file or folder does."""
    found = find(uri)
    facts = [(n, i["size"], str(i.get("ETag") or i.get("mtime"))) for n, i in found.items()]
    return hashlib.sha256(repr(sorted(facts)).encode()).hexdigest()


def fetch(uri: str) -> Path:
    """A local path with the content of `uri`: itself when local, else one copy for this machine.

    The copy is made under a lock, so that many workers fetch once, in ranges at the same time, and
    checked. It has a name of its own for each state of the remote files (names, sizes, ETags), so
    that a changed model is fetched again.
    In it the file or folder is called as it is there, since names tell what adapters are for.
    """
    if not is_remote(uri):
        return Path(uri.removeprefix("file://")).expanduser()
    path = open_fs(uri)[1]
    found = find(uri)
    if not found:
        raise StorageError(f"{uri}: nothing is there")
    state = sorted((name, info["size"], str(info.get("ETag"))) for name, info in found.items())
    key = hashlib.sha256(repr(("named", state)).encode()).hexdigest()[:32]
    cache = cache_folder()
    target, name = cache / key, os.path.basename(path.rstrip("/"))
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            partial = cache / f"{key}.partial"
            shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
            whole = partial if list(found) == [path] else partial / name
            ranges.download(uri, {n: (_local(n, path, whole), f) for n, f in found.items()})
            partial.rename(target)
    return target / name


def _local(name: str, root: str, folder: Path) -> Path:
    return folder / (os.path.basename(name) if name == root else os.path.relpath(name, root))
