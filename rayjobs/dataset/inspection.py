"""What is wrong with the files of a data set or of an export.

Owns the reading of every byte and the findings. Changes nothing, and knows nothing of how records
are made.
"""

import hashlib
from collections.abc import Callable, Container, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from rayjobs import storage
from rayjobs.dataset.lock import Lock, names_uri, snapshot_uri
from rayjobs.dataset.manifest import Entry, Manifest, is_foreign

READERS = 4
COLUMNS = ("record", "status", "image", "image_sha256")
BLOCK = 1 << 20
Numbers = Callable[[int], range | None]
"""The records that a shard has to hold, where that is known."""
ORIGIN = ("prompt", "model_sha256")
Doubt = Callable[[dict[str, Any]], str | None]
"""Why a row with its `ORIGIN` is none of the job's, if it is none."""
Look = Callable[[dict[str, Any]], Iterable[str]]
"""What else is wrong with a row, by its `COLUMNS` and its image_id."""


@dataclass(frozen=True)
class Fault:
    """Something wrong, and what has to be made again for it to be right."""

    text: str
    shard: int | None = None
    segment: int | None = None
    """One whose snapshots are not what they were."""
    manifest_file: str | None = None
    """Below manifest/; without it its shards count as unfinished."""


def inspect(
    manifest: Manifest,
    num_shards: int,
    numbers: Numbers,
    doubt: Doubt | None = None,
    look: Look | None = None,
) -> Iterator[tuple[Entry | None, list[Fault]]]:
    """Read every finished shard: its entry and what is wrong, first what belongs to no shard.

    Shards from `num_shards` on are nobody's, unless the manifest names them.
    """
    unreadable: list[str] = []
    entries = list(manifest.entries(unreadable))
    beside = [Fault(f"manifest/{name}: cannot be read", manifest_file=name) for name in unreadable]
    if not storage.exists(storage.join(manifest.uri, "README.md")):
        beside.append(Fault("README.md is missing; others would not know what to read"))
    named = [range(entry["shard"], entry["shard"] + 1) for entry in entries]
    named += map(manifest.shards_in, unreadable)
    shards = {*range(num_shards)}.union(*named)
    yield None, [*beside, *_strays(manifest, shards)]
    with ThreadPoolExecutor(READERS) as pool:
        yield from pool.map(
            lambda entry: (entry, list(_shard_faults(manifest, entry, numbers, doubt, look))),
            entries,
        )


def inspect_snapshots(uri: str, lock: Lock) -> list[Fault]:
    """Snapshots of prompts and init images that are gone, or not those of the lock."""
    faults = []
    for number, segment in enumerate(lock.segments):
        files = {snapshot_uri(uri, number): segment.prompts_sha256}
        if segment.init_sha256 is not None:
            files[names_uri(uri, number)] = segment.init_sha256
        for file_uri, sha256 in files.items():
            found = _sha256(file_uri)
            if found != sha256:
                what = "is missing" if found is None else "is not what the job was begun with"
                faults.append(Fault(f"prompts/{file_uri.rpartition('/')[2]} {what}", None, number))
    return faults


def _sha256(uri: str) -> str | None:
    digest = hashlib.sha256()
    try:
        with storage.open_input(uri) as file:
            while block := storage.through(uri, lambda: file.read(BLOCK)):
                digest.update(block)
    except storage.NotThere:
        return None
    return digest.hexdigest()


def _strays(manifest: Manifest, shards: Container[int]) -> Iterator[Fault]:
    """Files under data/ that are of no shard; those of unfinished ones will be replaced."""
    for name in storage.list_files(manifest.data):
        first = name.split("/")[0]
        number = int("".join(filter(str.isdigit, first)) or -1)
        if not (number in shards and first == manifest.format.name(number)) and not is_foreign(
            name
        ):
            yield Fault(f"data/{name}: is of no shard, but others would read it; remove it")


def _shard_faults(
    manifest: Manifest, entry: Entry, numbers: Numbers, doubt: Doubt | None, look: Look | None
) -> Iterator[Fault]:
    for text in _shard_texts(manifest, entry, numbers(entry["shard"]), doubt, look):
        yield Fault(text, entry["shard"])


def _shard_texts(
    manifest: Manifest,
    entry: Entry,
    numbers: range | None,
    doubt: Doubt | None,
    look: Look | None,
) -> Iterator[str]:
    shard, failed = entry["shard"], 0
    if not entry["rows"] and numbers is None:  # of an export's, which has nothing of this shard
        return
    sha256 = manifest.sha256(shard)
    if sha256 is None:
        yield f"shard {shard}: {entry['file']} is missing"
        return
    if sha256 != entry["sha256"]:
        difference = f"has SHA-256 {sha256[:12]}, not {entry['sha256'][:12]}"
        yield f"shard {shard}: {entry['file']} {difference}"
    seen, is_doubtful = [], False
    try:
        columns = COLUMNS + ORIGIN * bool(doubt) + ("image_id",) * bool(look)
        for row in manifest.format.read(manifest.data, shard, columns):
            seen.append(row["record"])
            failed += row["status"] != "ok"
            where = f"shard {shard}, record {row['record']}"
            yield from (f"{where}: {text}" for text in _row_faults(row, look))
            if doubt and not is_doubtful and (why := doubt(row)):
                is_doubtful = True  # the others are of that job, too
                yield f"{where}: {why}"
    except storage.Unavailable:  # which says nothing of the shard
        raise
    except Exception as error:  # damaged bytes break a reader in any way
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        yield f"shard {shard}: cannot be read on after record {seen[-1] if seen else '-'}: {reason}"
        return
    yield from (f"shard {shard}: {text}" for text in _count_faults(entry, numbers, seen, failed))


def _count_faults(
    entry: Entry, numbers: range | None, seen: list[int], failed: int
) -> Iterator[str]:
    if numbers is not None and seen != list(numbers):
        yield f"holds records {_span(seen)}, not {numbers[0]} .. {numbers[-1]}"
    elif len(seen) != entry["rows"]:
        yield f"holds {len(seen)} records, not {entry['rows']}"
    elif numbers is not None and failed != entry["failed"]:
        yield f"holds {failed} failed records, not {entry['failed']}"


def _row_faults(row: dict[str, Any], look: Look | None) -> Iterator[str]:
    if row["image"] is None:
        if row["status"] == "ok":
            yield "there is no picture"
    elif row["image_sha256"] not in (None, hashlib.sha256(row["image"]["bytes"]).hexdigest()):
        yield "the picture is not the one that was made (its SHA-256 differs)"
    if look is not None:
        yield from look(row)


def _span(numbers: list[int]) -> str:
    return f"{numbers[0]} .. {numbers[-1]} ({len(numbers)})" if numbers else "none"
