"""Reading a data set: the records of its committed shards, and nothing else in the folder.

Owns which files of a folder count: those that the manifest names. Knows nothing of who reads, or
of how shards are written.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property

from rayjobs.config import BadInput
from rayjobs.dataset.formats import Row
from rayjobs.dataset.lock import Lock, read_lock
from rayjobs.dataset.manifest import Entry, Manifest


class Reader:
    """The committed part of the data set at `uri`. Raises BadInput for a folder that is none."""

    def __init__(self, uri: str):
        lock = read_lock(uri)
        if lock is None:
            raise BadInput(f"{uri} is not a data set: it has no spec.lock.json")
        self.uri = uri
        self.lock: Lock = lock
        self._manifest = Manifest(uri, lock.format)

    @cached_property
    def _committed(self) -> tuple[Entry, ...]:
        return tuple(self._manifest.entries())

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The manifest's entries, by shard. Raises BadInput when no shard is committed."""
        if not self._committed:
            raise BadInput(
                f"{self.uri}: its manifest names no finished shard; run the command that makes "
                "this data set again, and it continues"
            )
        return self._committed

    @property
    def num_committed(self) -> int:
        """Records in committed shards, failed ones included; 0 when there is none yet."""
        return sum(entry["rows"] for entry in self._committed)

    def read_shard(self, entry: Entry, columns: Sequence[str] | None = None) -> Iterator[Row]:
        """A committed shard's records in order; pictures are read only when asked for."""
        return self._manifest.format.read(self._manifest.data, entry["shard"], columns)

    def read(self, columns: Sequence[str] | None = None) -> Iterator[Row]:
        """Every committed record, in order."""
        for entry in self.entries:
            yield from self.read_shard(entry, columns)
