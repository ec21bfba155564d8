"""The groups of pictures that are alike, as a report shows them: how many, and the largest.

Owns the script of the largest groups. Knows the tables' names, not how they came to be.
"""

import hashlib
import tarfile
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rayjobs import storage
from rayjobs.reports import contact_sheet

TABLES = {"duplicates": "duplicates.parquet", "semantic": "semantic.parquet"}
LARGEST_GROUPS = 12
PICTURES_PER_GROUP = 6
READERS = 4

BROKEN = (OSError, ValueError, KeyError, tarfile.TarError, pa.ArrowException)
"""What reading a damaged or missing shard may raise; a report shows the others."""


def write_largest(
    output_uri: str, file_name: str, suffix: str, existing: set[str]
) -> tuple[tuple[int, int] | None, str | None]:
    """Groups in a table and images in them; the script with the largest ones' pictures."""
    uri = storage.join(output_uri, file_name)
    if not storage.exists(uri):
        return None, None
    with storage.open_input(uri) as file:
        groups = pq.read_table(file, columns=["group"])["group"].value_counts()
    number, size = groups.field("values").to_numpy(), groups.field("counts").to_numpy()
    order = np.lexsort((number, -size))[:LARGEST_GROUPS]
    largest = {int(number[at]): int(size[at]) for at in order}
    counts = (len(number), int(size.sum()))
    if not largest:
        return counts, None
    with storage.open_input(uri) as file:
        names = ["group", "record", "image_id", "file"]
        table = pq.read_table(file, columns=names, filters=[("group", "in", list(largest))])
    members = _members(table.to_pylist(), largest)
    name = (
        f"{file_name.partition('.')[0]}-{hashlib.sha256(repr(members).encode()).hexdigest()[:16]}"
    )
    if f"{name}.js" not in existing:
        pictures = _pictures(
            output_uri, suffix, [one for group in members.values() for one in group]
        )
        groups = [
            {
                "size": largest[group],
                "rows": [pictures[one["record"]] for one in chosen if one["record"] in pictures],
            }
            for group, chosen in members.items()
        ]
        contact_sheet.write_script(storage.join(output_uri, "report"), name, groups)
    return counts, name


def _members(
    rows: list[dict[str, Any]], largest: dict[int, int]
) -> dict[int, list[dict[str, Any]]]:
    """The first few members of each of the largest groups."""
    members: dict[int, list[dict[str, Any]]] = {group: [] for group in largest}
    for row in rows:
        if len(members[row["group"]]) < PICTURES_PER_GROUP:
            members[row["group"]].append(row)
    return members


def _pictures(
    output_uri: str, suffix: str, rows: list[dict[str, Any]]
) -> dict[int, dict[str, Any]]:
    wanted: dict[int, set[int]] = {}
    for row in rows:
        wanted.setdefault(contact_sheet.shard_of(row["file"]), set()).add(row["record"])

    def read(shard: int) -> list[dict[str, Any]]:
        try:
            return contact_sheet.read_thumbnails(output_uri, shard, suffix, wanted[shard])
        except BROKEN:  # it is named where the shards are read
            return []

    with ThreadPoolExecutor(READERS) as pool:
        return {one["record"]: one for some in pool.map(read, wanted) for one in some}
