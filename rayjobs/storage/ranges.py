"""Large objects of S3 as local files: ranges of all of them at once, checked by their hashes.

Owns how they are divided, the trying again, and the check by ETag: an MD5 of the object, or of its
parts, unless the server encrypts with a key of its own. One stream of S3 gives about 100 MB/s, many
give what network and disk do. Threads, since s3fs reads all streams in one, and holds ranges of 50
MB in memory: of 1 GB it took 1.4 GB, a third more processor time and 1.5 times as long, unchecked.
Knows nothing of where copies are kept.
"""

import contextlib
import hashlib
import os
import random
import shutil
import sys
import threading
import time
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from rayjobs.storage import s3
from rayjobs.storage.s3 import StorageError, Unavailable

RANGE_BYTES = 64 << 20
"""Large ones are few requests: a thousand nodes at once would ask for more of smaller ones than S3
answers to one prefix (`benchmarks.scale`)."""
READ_BYTES = 1 << 20
STREAMS = 16
HASHERS = min(4, os.cpu_count() or 1)
TRIES = 10
LONGEST_PAUSE_S = 8.0
TOLD_BYTES = 200_000_000
"""Less is fetched without a word."""
TELL_EVERY_S = 10.0
CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 5, 60
GB = 1e9
num_retries = 0
"""Of this process, about: streams count it together."""


@dataclass
class _Object:
    """An object on its way into a local file."""

    uri: str
    path: Path
    size: int
    etag: str
    ranges: "list[Future[None]]" = field(default_factory=list)

    @property
    def place(self) -> dict[str, str]:
        bucket, _, key = self.uri.removeprefix("s3://").partition("/")
        return {"Bucket": bucket, "Key": key}


class _Transfer:
    """What the streams of one download share: how much is there, and whether to end."""

    def __init__(self, what: str, total: int):
        self.ended = threading.Event()
        self._what, self._total, self._done = what, total, 0
        self._started = self._told = time.monotonic()
        self._lock = threading.Lock()

    def add(self, size: int) -> None:
        with self._lock:
            self._done += size
            now = time.monotonic()
            if now < self._told + TELL_EVERY_S:
                return
            self._told = now
        self._say(f"fetching {self._what}: {self._done / GB:.2f} of {self._total / GB:.2f} GB")

    def tell_end(self) -> None:
        if self._total >= TOLD_BYTES:
            self._say(f"fetched {self._what}: {self._total / GB:.2f} GB")

    def _say(self, text: str) -> None:
        seconds = max(time.monotonic() - self._started, 1e-3)
        rate = self._done / GB / seconds
        print(f"{text} in {seconds:.1f} s, {rate:.2f} GB/s", file=sys.stderr, flush=True)


def download(what: str, files: dict[str, tuple[Path, dict[str, Any]]]) -> None:
    """Copy objects to local files, by their path on S3; with each goes what a listing tells of it.

    Folders are made. `what` is how people call it all. Raises StorageError when an object is not as
    it was listed, cannot be had, or does not fit on the disk.
    """
    objects = [
        _Object(f"s3://{name}", path, int(facts["size"]), str(facts.get("ETag", "")).strip('"'))
        for name, (path, facts) in files.items()
    ]
    total = sum(each.size for each in objects)
    _make_room(what, objects, total)
    transfer, _ = _Transfer(what, total), _client()  # one client, not one for each stream
    with ThreadPoolExecutor(STREAMS) as streams, ThreadPoolExecutor(HASHERS) as hashers:
        try:
            for each in objects:
                each.ranges = [
                    streams.submit(_fetch, each, start, transfer)
                    for start in range(0, each.size, RANGE_BYTES)
                ]
            for each in objects:
                _check(each, hashers)
        except BaseException:
            transfer.ended.set()
            for pool in (streams, hashers):
                pool.shutdown(wait=False, cancel_futures=True)
            raise
    transfer.tell_end()


def _make_room(what: str, objects: list[_Object], total: int) -> None:
    for each in objects:
        each.path.parent.mkdir(parents=True, exist_ok=True)
    folder = objects[0].path.parent
    if (free := shutil.disk_usage(folder).free) < total:
        raise StorageError(
            f"{what}: its {total / GB:.1f} GB do not fit on the disk of {folder}, where "
            f"{free / GB:.1f} GB are free; make room, or set RAYJOBS_CACHE to another disk's folder"
        )
    for each in objects:
        with each.path.open("wb") as file:
            file.truncate(each.size)


def _fetch(each: _Object, start: int, transfer: _Transfer) -> None:
    """Write the range that begins there; goes on where a broken connection left it."""
    end = min(start + RANGE_BYTES, each.size)
    for attempt in range(1, TRIES + 1):
        try:
            with (
                each.path.open("rb+", buffering=0) as file,
                contextlib.closing(_read(each, start, end)) as parts,
            ):
                for data in parts:
                    file.seek(start)
                    file.write(data)
                    start += len(data)
                    transfer.add(len(data))
                    if transfer.ended.is_set():
                        return
            if start == end:
                return
            raise Unavailable(f"{each.uri}: the connection ended early")
        except Unavailable:
            if attempt == TRIES:
                raise
        global num_retries
        num_retries += 1
        # Not all streams of all machines at the same moment.
        transfer.ended.wait(random.uniform(0, min(2.0**attempt, LONGEST_PAUSE_S)))


def _read(each: _Object, start: int, end: int) -> Generator[bytes]:
    wanted = each.place | {"Range": f"bytes={start}-{end - 1}"}
    answer = s3.asked(each.uri, lambda: _client().get_object(**wanted))
    with contextlib.closing(answer["Body"]) as body:
        if (etag := answer["ETag"].strip('"')) != each.etag:
            raise StorageError(f"{each.uri} changed while it was fetched ({etag}); start again")
        while data := s3.asked(each.uri, lambda: body.read(READ_BYTES)):
            yield data


def _check(each: _Object, hashers: ThreadPoolExecutor) -> None:
    """Wait for an object and raise StorageError unless its bytes have the hash of its ETag."""
    part_bytes = _part_bytes(each)
    if part_bytes is None:
        for one in each.ranges:
            one.result()
        return
    starts = range(0, each.size, part_bytes) or (0,)
    jobs = [hashers.submit(_digest, each, at, min(at + part_bytes, each.size)) for at in starts]
    digests = [job.result() for job in jobs]
    found = digests[0].hex()
    if "-" in each.etag:
        whole = hashlib.md5(b"".join(digests), usedforsecurity=False)
        found = f"{whole.hexdigest()}-{len(digests)}"
    if found != each.etag:
        raise StorageError(f"{each.uri}: its bytes have the hash {found}, not {each.etag}")


def _part_bytes(each: _Object) -> int | None:
    """How many bytes of it have an MD5 each; None where its ETag is no MD5."""
    is_parted = "-" in each.etag
    first = {"PartNumber": 1} if is_parted else {}
    try:
        facts = s3.asked(each.uri, lambda: _client().head_object(**each.place, **first))
    except StorageError:  # not every server knows of parts
        return None
    own_key = "aws:kms" in facts.get("ServerSideEncryption", "")
    if own_key or "SSECustomerAlgorithm" in facts or len(each.etag.partition("-")[0]) != 32:
        return None
    if not is_parted:
        return max(each.size, 1)
    size = int(facts["ContentLength"])
    return size if size and -(-each.size // size) == int(each.etag.partition("-")[2]) else None


def _digest(each: _Object, start: int, end: int) -> bytes:
    """MD5 of a part, as its ranges arrive; the bytes are still in memory, as the file's cache."""
    md5 = hashlib.md5(usedforsecurity=False)
    with each.path.open("rb", buffering=0) as file:
        file.seek(start)
        while start < end:
            number = start // RANGE_BYTES
            each.ranges[number].result()
            until = min(end, (number + 1) * RANGE_BYTES)
            while start < until:
                data = file.read(min(READ_BYTES, until - start))
                md5.update(data)
                start += len(data)
    return md5.digest()


def forget_connections() -> None:
    if _client.cache_info().currsize:
        _client().close()
    _client.cache_clear()


@lru_cache(maxsize=1)
def _client() -> Any:
    import botocore.session
    from botocore.config import Config

    config = Config(
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=READ_TIMEOUT_S,
        max_pool_connections=STREAMS + HASHERS,
        retries={"mode": "standard", "total_max_attempts": 3},
    )
    session = botocore.session.get_session()
    region = session.get_config_variable("region") or "us-east-1"
    return session.create_client("s3", region_name=region, config=config)
