"""One shard: the records it will hold, filled as results arrive, and its bytes when all are there.

Owns the order and the encoding of records. Bytes depend on the records alone: no time, host, path.
"""

import hashlib
import io
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from rayjobs.generation.spec import Record
from rayjobs.records import IMAGE

ROWS_PER_GROUP = 32


class Shard:
    """Collects the rows of shard `number`, which holds the records in `numbers`."""

    def __init__(self, number: int, numbers: range, schema: pa.Schema):
        self.number = number
        self.numbers = numbers
        self.schema = schema
        self._rows: dict[int, dict[str, Any]] = {}

    @property
    def is_complete(self) -> bool:
        return len(self._rows) == len(self.numbers)

    @property
    def num_failed(self) -> int:
        return sum(row["status"] != "ok" for row in self._rows.values())

    def put(self, record: Record, image: bytes | None, columns: Mapping[str, Any]) -> None:
        """Add one record: its encoded image, or None with the reason in `columns["error"]`."""
        row: dict[str, Any] = {
            "image": None if image is None else {"bytes": image, "path": None},
            "image_sha256": None if image is None else hashlib.sha256(image).hexdigest(),
            "prompt": record.prompt,
            "negative_prompt": record.negative_prompt,
            "seed": record.seed,
            "steps": record.steps,
            "init_image": record.init_image,
            "strength": record.strength if record.init_image is not None else None,
            "status": "failed" if image is None else "ok",
            **record.passed_through,
            **columns,
        }
        self._rows[record.number] = row

    def encode(self) -> bytes:
        """The parquet file: fixed schema, row groups and encodings."""
        rows = [self._rows[number] for number in self.numbers]
        arrays = [
            pa.array([row.get(field.name) for row in rows], field.type) for field in self.schema
        ]
        table = pa.Table.from_arrays(arrays, schema=self.schema)
        buffer = io.BytesIO()
        pq.write_table(
            table,
            buffer,
            row_group_size=ROWS_PER_GROUP,
            compression={name: "zstd" for name in self._leaves() if name != "image.bytes"},
            use_dictionary=False,
        )
        return buffer.getvalue()

    def _leaves(self) -> list[str]:
        names = [field.name for field in self.schema if field.type != IMAGE]
        return [*names, "image.bytes", "image.path"]


def encode_png(image: Image.Image) -> bytes:
    """A PNG whose bytes depend on the pixels alone."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()
