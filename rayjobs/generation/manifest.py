"""Which shards are finished: one small object for each, written last, is the only commit marker.

Owns the data set's layout and the commit. Knows nothing of what is in a shard.
"""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from rayjobs import storage
from rayjobs.records import canonical_json


class Manifest:
    """The manifest of the data set at `uri`."""

    def __init__(self, uri: str):
        self.uri = uri

    def data_uri(self, shard: int) -> str:
        return storage.join(self.uri, "data", f"shard-{shard:08d}.parquet")

    def entry_uri(self, shard: int) -> str:
        return storage.join(self.uri, "manifest", f"{shard:08d}.json")

    def is_committed(self, shard: int) -> bool:
        return storage.exists(self.entry_uri(shard))

    def committed(self) -> set[int]:
        """Numbers of all finished shards."""
        names = storage.list_files(storage.join(self.uri, "manifest"))
        return {int(name.removesuffix(".json")) for name in names if name[:-5].isdigit()}

    def entries(self) -> Iterator[dict[str, Any]]:
        """The finished shards' entries, in order."""
        for shard in sorted(self.committed()):
            yield json.loads(storage.read_bytes(self.entry_uri(shard)))

    def clean(self) -> None:
        """Remove what killed writers may have left; only when nobody writes."""
        storage.remove_folder(storage.join(self.uri, "tmp"))

    def commit(self, shard: int, data: bytes, facts: dict[str, Any]) -> dict[str, Any]:
        """Store a shard, then its entry; of two that commit the same shard the first one counts.

        Data without an entry is what a worker left that died in between: it may be replaced.
        """
        staging = storage.join(self.uri, "tmp")
        uri = self.data_uri(shard)
        new = storage.create_bytes(uri, data, staging)
        if not new and not self.is_committed(shard) and storage.read_bytes(uri) != data:
            storage.write_bytes(uri, data, staging)
        entry = {
            "shard": shard,
            "generation": 0,
            "file": f"data/shard-{shard:08d}.parquet",
            "sha256": hashlib.sha256(data).hexdigest(),
            "bytes": len(data),
            **facts,
        }
        storage.create_bytes(self.entry_uri(shard), canonical_json(entry), staging)
        return entry
