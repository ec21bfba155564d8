"""From a source shard to the target's shards: choose, convert, divide into splits, commit.

Owns what becomes of a record, and the target's shard numbers. Knows nothing of the order of events.
"""

import hashlib
import io
import itertools
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from PIL import Image
from pydantic import Field

from rayjobs import storage
from rayjobs.config import Config
from rayjobs.dataset.manifest import Entry, Manifest
from rayjobs.dataset.records import canonical_json
from rayjobs.generation.tools.filters import Condition, Row
from rayjobs.images.encode import encode_picture, parameters_text


class ExportOutput(Config):
    uri: str
    """The new data set's folder, local or s3://."""
    format: Literal["parquet", "webdataset", "folder"] = "parquet"
    """The shards' format."""
    image_format: Literal["png", "webp", "webp-lossless", "jpeg"] | None = None
    """The pictures' format; without it, and without size, their bytes stay as they are."""
    quality: int = Field(default=95, ge=1, le=100)
    """Of jpeg and webp pictures that are encoded again."""
    size: int | None = Field(default=None, ge=1)
    """Pixels of the longer side; the other one keeps the picture's shape."""


@dataclass(frozen=True)
class Transfer:
    """Everything that a source shard's export needs; used by several threads at once."""

    output: ExportOutput
    source: Manifest
    target: Manifest
    source_schema: pa.Schema
    schema: pa.Schema
    conditions: tuple[Condition, ...]
    dropped: np.ndarray
    """Numbers of records that repeat another one, sorted."""
    splits: Mapping[str, float]
    digits: int
    """Of a source shard's number; a target shard's has its split's in front."""
    image_format: str
    """Of pictures that are encoded again."""

    def finished(self, num_shards: int) -> np.ndarray:
        """(splits, source shards): from which generation each was exported, -1 for not at all."""
        done = np.full((len(self.splits), num_shards), -1, np.int32)
        for entry in self.target.entries():
            split, shard = divmod(entry["shard"], 10**self.digits)
            done[split, shard] = entry["generation"]
        return done

    def shard(self, entry: Entry) -> None:
        """Export one source shard: a target shard for each split."""
        started = time.monotonic()
        parts: list[list[Row]] = [[] for _ in self.splits]
        data, number = self.source.data, entry["shard"]
        for row in self.source.format.read(data, number, schema=self.source_schema):
            if self._is_chosen(row):
                parts[self._split(row["image_id"])].append(self._converted(row))
        for split, rows in enumerate(parts):
            facts = {
                "generation": entry["generation"],  # the source's: tells what was made again
                "rows": len(rows),
                "failed": sum(row["status"] != "ok" for row in rows),
                "seconds": round(time.monotonic() - started, 3),
                "finished_at": round(time.time(), 3),
                "worker": f"{os.uname().nodename}-{os.getpid()}",
                "node": os.uname().nodename,
                "class": entry.get("class"),
                "class_changed": entry.get("class_changed"),
            }
            self._store(split * 10**self.digits + number, rows, facts)

    def _is_chosen(self, row: Row) -> bool:
        at = int(np.searchsorted(self.dropped, row["record"]))
        if at < len(self.dropped) and self.dropped[at] == row["record"]:
            return False
        if row["image"] is None and all(c.column != "status" for c in self.conditions):
            return False
        return all(condition.holds(row) for condition in self.conditions)

    def _split(self, image_id: str) -> int:
        digest = hashlib.sha256(f"split|{image_id}".encode()).digest()
        place = int.from_bytes(digest[:8], "big") / 2**64
        ends = list(itertools.accumulate(self.splits.values()))
        return next((n for n, end in enumerate(ends) if place < end), len(ends) - 1)

    def _converted(self, row: Row) -> Row:
        """The row with its picture as the target wants it."""
        output = self.output
        if row["image"] is None or (output.image_format is None and output.size is None):
            return row
        image: Image.Image = Image.open(io.BytesIO(row["image"]["bytes"]))
        text = parameters_text(row) if self.image_format == "png" else None
        if output.size is not None:
            share = output.size / max(image.size)
            size = (max(1, round(image.width * share)), max(1, round(image.height * share)))
            image = image.resize(size, Image.Resampling.LANCZOS)
        data = encode_picture(image, self.image_format, output.quality, text)
        return row | {
            "image": {"bytes": data, "path": None},
            "image_sha256": hashlib.sha256(data).hexdigest(),
            "width": image.width,
            "height": image.height,
        }

    def _store(self, number: int, rows: list[Row], facts: dict[str, Any]) -> None:
        target = self.target
        old = target.entry(number)
        if old is not None and old["generation"] == facts["generation"]:
            return
        if rows:
            files = target.format.encode(number, rows, self.schema)
            if old is None:
                target.commit(number, files, facts)
            else:
                target.replace(old, files, facts)
            return
        # Nothing of this shard is in this split: its entry says so, there is no file.
        uri = storage.join(target.data, name := target.format.name(number))
        if old is not None and old["rows"]:
            storage.remove_folder(uri)
        nothing = {"shard": number, "file": f"data/{name}", "sha256": "", "bytes": 0}
        storage.write_bytes(
            target.entry_uri(number), canonical_json(nothing | facts), target.staging
        )
