"""One shard: the records it holds, gathered as they are made.

Owns their order and when a shard is complete. Knows nothing of formats or of storage.
"""

from collections.abc import Collection
from typing import Any


class Shard:
    """Collects the rows of shard `number`, which holds the records in `numbers`.

    `kept` are rows that are there already and are copied as they are.
    """

    def __init__(self, number: int, numbers: range, kept: Collection[dict[str, Any]] = ()):
        self.number = number
        self.numbers = numbers
        self._rows = {row["record"]: row for row in kept}

    @property
    def is_complete(self) -> bool:
        return len(self._rows) == len(self.numbers)

    @property
    def missing(self) -> list[int]:
        return [number for number in self.numbers if number not in self._rows]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """In the order of their records."""
        return [self._rows[number] for number in self.numbers]

    def put(self, row: dict[str, Any]) -> None:
        self._rows[row["record"]] = row
