"""Attempt markers: they find out a record that crashes its worker, and its neighbours survive.

Owns the markers and who is to blame. Knows nothing of how records are made.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from rayjobs import storage

MAX_SOLO_CRASHES = 2
"""Crashes of a worker while it made one record alone, after which that record is marked failed."""


@dataclass
class Attempt:
    """What is known of a shard's earlier attempts, this one counted."""

    number: int = 1
    record: int | None = None
    """The record that is being made alone."""
    deaths: dict[int, int] = field(default_factory=dict)
    """Crashes of workers, by the record that each was making alone."""
    run: str = ""
    """The run whose worker makes it."""
    node: str = ""
    """The machine on which it is made."""

    @property
    def culprits(self) -> list[int]:
        return [record for record, deaths in self.deaths.items() if deaths >= MAX_SOLO_CRASHES]


class Attempts:
    """Markers below attempts/ of the data set at `uri`, each written before its shard is made.

    A marker that is there when a shard is begun means that the process which wrote it is gone. Its
    record is to blame only if nothing else is: within one `run`, that is with the same driver, and
    where the machine on which it was made still `is_alive`.
    """

    def __init__(
        self,
        uri: str,
        run: str = "",
        node: str = "",
        is_alive: Callable[[str], bool] = lambda node: True,
    ):
        self.uri = uri
        self._run = run
        self._node = node
        self._is_alive = is_alive

    def begin(self, shard: int, attempt: Attempt | None) -> Attempt:
        """Note that a shard is being made; the result counts the earlier attempts.

        `attempt` is what `last` told of it.
        """
        if attempt is None:
            attempt = Attempt()
        elif attempt.run == self._run and self._is_alive(attempt.node):
            attempt.number += 1
            if attempt.record is not None:
                attempt.deaths[attempt.record] = attempt.deaths.get(attempt.record, 0) + 1
        attempt.record, attempt.run, attempt.node = None, self._run, self._node
        self._write(shard, attempt)
        return attempt

    def begin_record(self, shard: int, attempt: Attempt, record: int) -> None:
        """Note that this record of a shard is being made, and no other."""
        attempt.record = record
        self._write(shard, attempt)

    def end(self, shard: int) -> None:
        storage.remove(self._marker(shard))

    def _marker(self, shard: int) -> str:
        return storage.join(self.uri, "attempts", f"{shard:08d}.json")

    def last(self, shard: int) -> Attempt | None:
        """The attempt at a shard whose worker is gone."""
        try:
            marker = json.loads(storage.read_bytes(self._marker(shard)))
        except storage.NotThere:
            return None
        marker["deaths"] = {int(record): deaths for record, deaths in marker["deaths"].items()}
        return Attempt(**{"run": "unknown"} | marker)

    def _write(self, shard: int, attempt: Attempt) -> None:
        staging = storage.join(self.uri, "tmp")
        data = json.dumps(asdict(attempt)).encode()
        # It has to outlive this process, not the machine: the engine should not wait for a disk.
        storage.write_bytes(self._marker(shard), data, staging, durable=False)
