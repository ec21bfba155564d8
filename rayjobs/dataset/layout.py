"""What a format of shards is: names, bytes, and the way back to rows.

Owns what all formats do alike. Knows none of them.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from rayjobs import storage
from rayjobs.dataset.records import Row


class Format(ABC):
    """One way to lay out shards below a data set's `data` folder."""

    @abstractmethod
    def name(self, shard: int) -> str:
        """The shard's file or folder, below `data`."""

    @abstractmethod
    def encode(self, shard: int, rows: Sequence[Row], schema: pa.Schema) -> dict[str, bytes]:
        """The shard's files by name below `data`, in the order in which they are to be written."""

    @abstractmethod
    def card(self, schema: pa.Schema, image_format: str) -> dict[str, Any]:
        """What the data set's card says for `datasets.load_dataset` to find pictures and types."""

    def check(self, schema: pa.Schema) -> None:  # noqa: B027 -- most formats take them all
        """Raise BadInput when shards of such records cannot be written here."""

    def seal(  # noqa: B027 -- most formats need nothing
        self, uri: str, schema: pa.Schema, splits: Mapping[str, Mapping[int, int]]
    ) -> None:
        """What is written once all shards of an export are there: by split, each one's records."""

    def read(
        self,
        data_uri: str,
        shard: int,
        columns: Sequence[str] | None = None,
        schema: pa.Schema | None = None,
    ) -> Iterator[Row]:
        """A finished shard's rows, one at a time; pictures are read only when asked for.

        Missing `columns` are None. With the records' `schema`, values that JSON holds in another
        form get their types back; parquet needs none.
        """
        for row in self._rows(storage.join(data_uri, self.name(shard)), columns, schema):
            yield row if columns is None else {name: row.get(name) for name in columns}

    @abstractmethod
    def _rows(
        self, uri: str, columns: Sequence[str] | None, schema: pa.Schema | None
    ) -> Iterator[Row]:
        """The rows of the shard at `uri`, with these columns at least."""
