"""The tables beside a data set's shards that say which of its pictures are alike.

Owns their columns, how they are written and how they are read. Knows nothing of what "alike" means.
"""

import hashlib
import io
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rayjobs import storage
from rayjobs.config import BadInput
from rayjobs.dataset.lock import Lock, read_lock
from rayjobs.dataset.manifest import Manifest

READERS = 16
T = TypeVar("T")
R = TypeVar("R")


def schema(likeness: pa.Field) -> pa.Schema:
    """The columns of a table whose last tells how near a picture is to the first of its group."""
    fields = [("group", pa.int64()), ("record", pa.int64()), ("image_id", pa.string())]
    return pa.schema([*fields, ("file", pa.string()), likeness])


@dataclass(frozen=True)
class Shard:
    """The records of a shard that have a picture, and what is compared of them."""

    number: int
    file: str
    records: np.ndarray
    values: Any


def open_data_set(uri: str) -> tuple[Lock, Manifest]:
    """Raises BadInput where none is."""
    lock = read_lock(uri)
    if lock is None:
        raise BadInput(f"{uri}: no data set is there; generate it first")
    return lock, Manifest(uri, lock.format)


def read_shards(
    manifest: Manifest, column: str, columns: Sequence[str], pack: Callable[[list[Any]], Any]
) -> list[Shard]:
    """All shards, with the `columns` of each row that has `column` packed."""

    def read(entry: dict[str, Any]) -> Shard:
        rows = manifest.format.read(manifest.data, entry["shard"], columns=("record", *columns))
        made = [row for row in rows if row[column] is not None]
        records = np.array([row["record"] for row in made], np.int64)
        return Shard(entry["shard"], entry["file"], records, pack(made))

    return list(_each(read, manifest.entries()))


def write(
    manifest: Manifest,
    uri: str,
    columns: pa.Schema,
    shards: Sequence[Shard],
    first: np.ndarray,
    likeness: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> dict[str, int]:
    """Write the table of groups of two or more at `uri`; return its counts.

    `first` has for each picture the index of its group's first, and `likeness` is of pictures and
    such firsts. The counts are of pictures looked at, of groups, of their members, and of the
    members of the largest.
    """
    sizes = np.bincount(first, minlength=1)
    numbers = np.where(sizes > 1, np.cumsum(sizes > 1) - 1, -1)
    starts = itertools.accumulate((len(shard.records) for shard in shards), initial=0)
    work = partial(_members, manifest, columns, (first, numbers), likeness)
    tables = _each(work, zip(shards, starts, strict=False))
    parts = (part for part in tables if part.num_rows)  # of many shards most have no member
    table = pa.concat_tables([columns.empty_table(), *parts]).sort_by(
        [("group", "ascending"), ("record", "ascending")]
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    storage.write_bytes(uri, buffer.getvalue(), manifest.staging)
    return {
        "pictures": len(first),
        "groups": int((sizes > 1).sum()),
        "members": table.num_rows,
        "largest": int(sizes[sizes > 1].max(initial=0)),
    }


def _members(
    manifest: Manifest,
    columns: pa.Schema,
    found: tuple[np.ndarray, np.ndarray],
    likeness: Callable[[np.ndarray, np.ndarray], np.ndarray],
    part: tuple[Shard, int],
) -> pa.Table:
    """A shard's rows of the table, from its first picture's index on."""
    (first, numbers), (shard, start) = found, part
    there = np.arange(start, start + len(shard.records))
    there = there[numbers[first[there]] >= 0]  # the number of a group is at its first's index
    if not len(there):
        return columns.empty_table()
    rows = manifest.format.read(manifest.data, shard.number, columns=("record", "image_id"))
    ids = {row["record"]: row["image_id"] for row in rows}
    records = shard.records[there - start]
    values = [
        numbers[first[there]],
        records,
        [ids[record] for record in records.tolist()],
        [shard.file] * len(there),
        likeness(there, first[there]),
    ]
    arrays = [pa.array(each, field.type) for each, field in zip(values, columns, strict=True)]
    return pa.Table.from_arrays(arrays, schema=columns)


def _each(work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Results in the order of the items, a few at a time: storage answers many as fast as one."""
    items = iter(items)
    with ThreadPoolExecutor(READERS) as pool:
        while some := list(itertools.islice(items, 4 * READERS)):
            yield from pool.map(work, some)


def repeated(uri: str, name: str) -> np.ndarray:
    """The records of every group in a data set's table but its first, sorted."""
    table_uri = storage.join(uri, name)
    if not storage.exists(table_uri):
        raise BadInput(f"drop_duplicates: {table_uri} is missing; `rayjobs report {uri}` writes it")
    with storage.open_input(table_uri) as file:
        table = pq.read_table(file, columns=["group", "record"])
    group, record = table["group"].to_numpy(), table["record"].to_numpy()
    order = np.lexsort([record, group])
    group, record = group[order], record[order]
    return np.sort(record[1:][group[1:] == group[:-1]])


def sha256(uri: str, name: str) -> str:
    digest = hashlib.sha256()
    with storage.open_input(storage.join(uri, name)) as table:
        while block := table.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
