"""Which shards are finished: one small object each, written last, is the only commit marker.

Owns the data set's layout, the commit, the replacement of a shard by its next generation, and the
compaction of a thousand entries into one file. Knows nothing of what is in a shard.
"""

import hashlib
import io
import json
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rayjobs import storage
from rayjobs.config import BadInput
from rayjobs.dataset.formats import FORMATS
from rayjobs.dataset.records import canonical_json

GROUP = 1000
"""Shards whose entries share a compact file once all of them are finished."""
ENTRY = pa.schema(
    [
        ("shard", pa.int64()),
        ("generation", pa.int32()),
        ("file", pa.string()),
        ("sha256", pa.string()),
        ("bytes", pa.int64()),
        ("rows", pa.int32()),
        ("failed", pa.int32()),
        ("seconds", pa.float64()),
        ("finished_at", pa.float64()),
        ("worker", pa.string()),
        ("node", pa.string()),
        ("class", pa.string()),
        ("class_changed", pa.bool_()),
    ]
)
Entry = dict[str, Any]
READERS = 16
FOREIGN = ("Thumbs.db", "desktop.ini")
"""Beside names that begin with a dot, what file managers leave wherever they look."""


class Damaged(BadInput):
    """A file of the manifest, of that `name`, cannot be read."""

    def __init__(self, data_set_uri: str, name: str):
        super().__init__(
            f"{data_set_uri}: manifest/{name} is damaged; `rayjobs verify {data_set_uri}` says "
            "what else is, and how to repair it"
        )
        self.name = name


class Manifest:
    """The manifest of the data set at `uri`, whose shards have the format of that name."""

    def __init__(self, uri: str, format: str = "parquet"):
        self.uri = uri
        self.format = FORMATS[format]
        self.staging = storage.join(uri, "tmp")

    @property
    def data(self) -> str:
        return storage.join(self.uri, "data")

    def file_uri(self, name: str) -> str:
        """A file of the manifest."""
        return storage.join(self.uri, "manifest", name)

    @staticmethod
    def shards_in(name: str) -> range:
        """The shards whose entries are in the manifest's file of that name."""
        number, count = (int(name[8:-8]), GROUP) if name[0] == "c" else (int(name[:-5]), 1)
        return range(number * count, (number + 1) * count)

    def entry_uri(self, shard: int) -> str:
        return self.file_uri(f"{shard:08d}.json")

    def compact_uri(self, group: int) -> str:
        return self.file_uri(f"compact-{group:08d}.parquet")

    def _intent_uri(self, shard: int) -> str:
        """A replacement that was begun: its entry is here until it is the manifest's."""
        return storage.join(self.uri, "replacing", f"{shard:08d}.json")

    # Reading

    def is_committed(self, shard: int) -> bool:
        # In this order: an entry goes away only once the compact file is there.
        group = self.compact_uri(shard // GROUP)
        return storage.is_file(self.entry_uri(shard)) or storage.is_file(group)

    def entry(self, shard: int) -> Entry | None:
        """A finished shard's entry."""
        if storage.is_file(self.entry_uri(shard)):
            return self._read_entry(shard)
        if storage.is_file(self.compact_uri(shard // GROUP)):
            return self._read_compact(shard // GROUP).get(shard)
        return None

    def committed(self, num_shards: int) -> np.ndarray:
        """For each shard whether it is finished, (num_shards,) bool."""
        done = np.zeros(num_shards, bool)
        single, compact = self._names()
        for group in compact:
            done[group * GROUP : (group + 1) * GROUP] = True
        done[single[single < num_shards]] = True
        return done

    def is_untouched(self) -> bool:
        """Whether nothing was made yet, nor is being made, as far as markers tell."""
        places = ("manifest", "data", "attempts")
        return not any(
            not is_foreign(name)
            for place in places
            for name in storage.list_files(storage.join(self.uri, place))
        )

    def entries(self, unreadable: list[str] | None = None) -> Iterator[Entry]:
        """The finished shards' entries, in order; a group of them in memory at a time.

        Names of damaged files are put into `unreadable`; without it one of them raises Damaged.
        """
        single, compact = self._names()
        by_group = {group: list(some) for group, some in groupby(single, lambda n: int(n) // GROUP)}
        with ThreadPoolExecutor(READERS) as pool:
            for group in sorted(by_group.keys() | compact):
                mine = by_group.get(group, [])
                jobs = [partial(self._read_single, int(shard)) for shard in mine]
                jobs = [partial(self._read_compact, group)] * (group in compact) + jobs
                by_shard: dict[int, Entry] = {}
                for found in pool.map(lambda read: _unless_damaged(read, unreadable), jobs):
                    by_shard |= found
                for shard in sorted(by_shard):
                    yield by_shard[shard]

    def unseen(self, seen: np.ndarray) -> Iterator[Entry]:
        """Entries of finished shards that are not `seen`, (num_shards,) bool; others may write.

        One that is gathered at this moment comes the next time.
        """
        single, compact = self._names()
        single = single[single < len(seen)]
        with ThreadPoolExecutor(READERS) as pool:
            yield from filter(None, pool.map(self._read_if_there, single[~seen[single]].tolist()))
        for group in sorted(compact):
            if not seen[group * GROUP : (group + 1) * GROUP].all():
                by_shard = self._read_compact(group)
                yield from (by_shard[shard] for shard in by_shard if not seen[shard])

    def _read_if_there(self, shard: int) -> Entry | None:
        try:
            return self._read_entry(shard)
        except storage.NotThere:
            return None

    def _names(self) -> tuple[np.ndarray, set[int]]:
        """Shards with an entry of their own, sorted, and groups with a compact file."""
        names = storage.list_files(storage.join(self.uri, "manifest"))
        single = [int(n[:-5]) for n in names if n.endswith(".json") and n[:-5].isdigit()]
        compact = {int(n[8:-8]) for n in names if n.startswith("compact-") and n[8:-8].isdigit()}
        return np.array(sorted(single), np.int64), compact

    def _read_single(self, shard: int) -> dict[int, Entry]:
        return {shard: self._read_entry(shard)}

    def _read_entry(self, shard: int) -> Entry:
        with self._whole(self.entry_uri(shard)):
            entry: Entry = json.loads(storage.read_bytes(self.entry_uri(shard)))
            self._check_entry(entry, shard)
            return entry

    def _read_compact(self, group: int) -> dict[int, Entry]:
        data = storage.read_bytes(self.compact_uri(group))
        with self._whole(self.compact_uri(group)):
            rows = pq.read_table(io.BytesIO(data)).to_pylist()
            for shard, row in zip(range(group * GROUP, (group + 1) * GROUP), rows, strict=True):
                self._check_entry(row, shard)
            return {row["shard"]: row for row in rows}

    def _check_entry(self, entry: Entry, shard: int) -> None:
        """Raise ValueError, KeyError or TypeError for what no worker writes of this shard."""
        name = re.fullmatch(r"data/[^/]*?(\d{8})[^/]*", entry["file"])
        is_its = entry["shard"] == shard and name is not None and int(name[1]) == shard
        counts = (entry["generation"], entry["failed"], entry["rows"])
        is_right = all(type(count) is int and count >= 0 for count in counts)
        if (
            not is_its
            or not is_right
            or entry["failed"] > entry["rows"]
            or type(entry["sha256"]) is not str
        ):
            raise ValueError

    @contextmanager
    def _whole(self, uri: str) -> Generator[None]:
        try:
            yield
        except (ValueError, KeyError, TypeError, pa.ArrowException):
            raise Damaged(self.uri, uri.rpartition("/")[2]) from None

    # Writing

    def commit(self, shard: int, files: Mapping[str, bytes], facts: Entry) -> Entry:
        """Store a shard, then its entry; of two that commit the same shard the first one counts.

        Data without an entry is what a worker left that died in between: it may be replaced.
        """
        self._store(shard, files)
        entry = self._entry(shard, 0, files, facts)
        mine = storage.create_bytes(self.entry_uri(shard), canonical_json(entry), self.staging)
        if mine and storage.is_file(self.compact_uri(shard // GROUP)):
            # Others were first, and their entries are gathered already: ours must not overrule.
            storage.remove(self.entry_uri(shard))
            mine = False
        return entry if mine else self.entry(shard) or entry

    def replace(self, old: Entry, files: Mapping[str, bytes], facts: Entry) -> Entry:
        """Replace a finished shard by its next generation.

        The new entry is noted before the data changes, so that `recover` can finish what a crash
        cut off: at no moment do data and entry disagree without a note of it.
        """
        shard = old["shard"]
        mark = storage.etag(self.entry_uri(shard))
        entry = self._entry(shard, old["generation"] + 1, files, facts)
        storage.write_bytes(self._intent_uri(shard), canonical_json(entry), self.staging)
        self._overwrite(shard, files)
        self._install(entry, mark)
        storage.remove(self._intent_uri(shard))
        return entry

    def recover(self) -> None:
        """Finish or forget replacements that were cut off; only when nobody writes."""
        folder = storage.join(self.uri, "replacing")
        for name in storage.list_files(folder):
            uri = storage.join(folder, name)
            entry: Entry = json.loads(storage.read_bytes(uri))
            if self.sha256(entry["shard"]) == entry["sha256"]:
                self._install(entry, storage.etag(self.entry_uri(entry["shard"])))
            storage.remove(uri)

    def sha256(self, shard: int) -> str | None:
        """Of a shard's data as it lies there now; None when there is none."""
        name = self.format.name(shard)
        uri = storage.join(self.data, name)
        if storage.is_folder(uri):
            names = storage.list_files(uri)
            own = [n for n in names if not is_foreign(n)]
            files = {f"{name}/{n}": storage.read_bytes(storage.join(uri, n)) for n in own}
            return hash_of(files)
        return hash_of({name: storage.read_bytes(uri)}) if storage.exists(uri) else None

    def clean(self) -> None:
        """Remove what killed writers may have left; only when nobody writes."""
        for folder in ("tmp", "attempts", "replacing"):
            storage.remove_folder(storage.join(self.uri, folder))

    def compact(self) -> None:
        """Gather the entries of groups that are complete; only when nobody replaces shards."""
        single, compact = self._names()
        groups, counts = np.unique(single // GROUP, return_counts=True)
        for group, count in zip(groups.tolist(), counts.tolist(), strict=True):
            if group in compact:
                mine = single[single // GROUP == group].tolist()
                self._gather(group, self._read_compact(group) | self._read_singles(mine), mine)
            elif count == GROUP:
                self.gather(group, {})

    def gather(self, group: int, known: Mapping[int, Entry]) -> None:
        """Gather the entries of a complete group; those that are `known` are not read again."""
        shards = range(group * GROUP, (group + 1) * GROUP)
        try:
            read = self._read_singles([shard for shard in shards if shard not in known])
        except storage.NotThere:
            if storage.is_file(self.compact_uri(group)):  # another run was faster
                return
            raise
        self._gather(group, {**known, **read}, shards)

    def _gather(self, group: int, by_shard: Mapping[int, Entry], singles: Iterable[int]) -> None:
        self._write_compact(group, by_shard)
        names = (f"{shard:08d}.json" for shard in singles)
        storage.remove_files(storage.join(self.uri, "manifest"), names)

    def _read_singles(self, shards: list[int]) -> dict[int, Entry]:
        with ThreadPoolExecutor(READERS) as pool:
            return dict(zip(shards, pool.map(self._read_entry, shards), strict=True))

    def _write_compact(self, group: int, by_shard: Mapping[int, Entry]) -> None:
        rows = [by_shard[shard] for shard in sorted(by_shard)]
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, ENTRY), buffer, compression="zstd")
        storage.write_bytes(self.compact_uri(group), buffer.getvalue(), self.staging)

    def _store(self, shard: int, files: Mapping[str, bytes]) -> None:
        """Put a shard's data in place unless the same is there already."""
        name = self.format.name(shard)
        if list(files) != [name]:
            if not self.is_committed(shard):
                self._overwrite(shard, files)
            return
        uri, data = storage.join(self.data, name), files[name]
        new = storage.create_bytes(uri, data, self.staging)
        if not new and not self.is_committed(shard) and storage.read_bytes(uri) != data:
            storage.write_bytes(uri, data, self.staging)

    def _overwrite(self, shard: int, files: Mapping[str, bytes]) -> None:
        name = self.format.name(shard)
        uri = storage.join(self.data, name)
        if list(files) == [name]:
            storage.write_bytes(uri, files[name], self.staging)
        else:
            inside = {path.removeprefix(f"{name}/"): data for path, data in files.items()}
            storage.put_folder(uri, inside, self.staging)

    def _install(self, entry: Entry, mark: str | None) -> None:
        """Make a next generation's entry the shard's own, unless another was faster."""
        uri, data = self.entry_uri(entry["shard"]), canonical_json(entry)
        if mark is None:  # the old one is in a compact file, which a single entry overrules
            storage.create_bytes(uri, data, self.staging)
        else:
            storage.replace_bytes(uri, data, mark, self.staging)

    def _entry(
        self, shard: int, generation: int, files: Mapping[str, bytes], facts: Entry
    ) -> Entry:
        return {
            "shard": shard,
            "generation": generation,
            "file": f"data/{self.format.name(shard)}",
            "sha256": hash_of(files),
            "bytes": sum(map(len, files.values())),
            **facts,
        }


def is_foreign(name: str) -> bool:
    """Whether a file below data/ is what a file manager left there."""
    last = name.rpartition("/")[2]
    return last.startswith(".") or last in FOREIGN


def _unless_damaged(
    read: Callable[[], dict[int, Entry]], unreadable: list[str] | None
) -> dict[int, Entry]:
    try:
        return read()
    except Damaged as error:
        if unreadable is None:
            raise
        unreadable.append(error.name)
        return {}


def hash_of(files: Mapping[str, bytes]) -> str:
    """A single file's SHA-256; of several that of the sorted list of their hashes and names."""
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    if len(hashes) == 1 and "/" not in next(iter(hashes)):
        return next(iter(hashes.values()))
    lines = "".join(f"{hashes[name]}  {name}\n" for name in sorted(hashes))
    return hashlib.sha256(lines.encode()).hexdigest()
