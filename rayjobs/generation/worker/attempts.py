"""Attempts at shards, noted before they are made, so that what kills its worker is found out.

Owns the markers and whom they blame. A marker that is still there when a shard is begun means that
the process which wrote it is gone. Knows nothing of how shards are made.
"""

import json
from dataclasses import asdict, dataclass, field

from rayjobs import storage

ALONE = 2
"""Deaths of a worker while it made one record alone, after which that record is given up."""


@dataclass
class Attempt:
    """What is known of a shard's earlier attempts, this one counted."""

    number: int = 1
    record: int | None = None
    """The record that is being made alone."""
    deaths: dict[int, int] = field(default_factory=dict)
    """Of workers, by the record that they made alone at that moment."""

    @property
    def guilty(self) -> list[int]:
        return [record for record, deaths in self.deaths.items() if deaths >= ALONE]


class Attempts:
    """The markers of the data set at `uri`; after `most` attempts a shard's records go alone."""

    def __init__(self, uri: str, most: int):
        self.uri = uri
        self.most = most

    def begin(self, shard: int) -> Attempt:
        """Note that a shard is being made; what is returned says how often that was so before."""
        attempt = self._read(shard)
        if attempt.record is not None:
            attempt.deaths[attempt.record] = attempt.deaths.get(attempt.record, 0) + 1
            attempt.record = None
        self._write(shard, attempt)
        return attempt

    def alone(self, shard: int, attempt: Attempt, record: int) -> None:
        """Note that of a shard this record is being made, and no other."""
        attempt.record = record
        self._write(shard, attempt)

    def end(self, shard: int) -> None:
        storage.remove(self._marker(shard))

    def _marker(self, shard: int) -> str:
        return storage.join(self.uri, "attempts", f"{shard:08d}.json")

    def _read(self, shard: int) -> Attempt:
        try:
            found = json.loads(storage.read_bytes(self._marker(shard)))
        except storage.NotThere:
            return Attempt()
        deaths = {int(record): deaths for record, deaths in found["deaths"].items()}
        return Attempt(found["number"] + 1, found["record"], deaths)

    def _write(self, shard: int, attempt: Attempt) -> None:
        staging = storage.join(self.uri, "tmp")
        data = json.dumps(asdict(attempt)).encode()
        # It has to outlive this process, not the machine: the engine should not wait for a disk.
        storage.write_bytes(self._marker(shard), data, staging, durable=False)
