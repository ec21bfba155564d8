"""What becomes of one of a data set's shards when it is exported.

Owns the target's shard numbers, the choice of records and columns, and what a record turns into.
Knows nothing of which shards are to be exported.
"""

import hashlib
import io
import itertools
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from rayjobs import storage
from rayjobs.config import BadInput
from rayjobs.dataset.formats import check_schema
from rayjobs.dataset.lock import Lock
from rayjobs.dataset.manifest import Entry, Manifest
from rayjobs.dataset.records import Row, canonical_json, feature, pictures
from rayjobs.generation.spec.lock import data_set_schema
from rayjobs.generation.tools.export_config import ExportConfig, ExportOutput
from rayjobs.generation.tools.filters import Condition, parse
from rayjobs.images import watermark
from rayjobs.images.credentials import Signing
from rayjobs.images.encode import encode_picture, extension_of
from rayjobs.images.parameters import parameters_text
from rayjobs.provenance import marks
from rayjobs.quality import table
from rayjobs.reports import card

REQUIRED_COLUMNS = ("image", "record", "prompt")
"""Columns that shards of some format are made of; they are always exported."""


@dataclass(frozen=True)
class ShardExporter:
    """Everything that a source shard's export needs; used by several threads at once."""

    output: ExportOutput
    source: Manifest
    target: Manifest
    source_schema: pa.Schema
    schema: pa.Schema
    conditions: tuple[Condition, ...]
    dropped_records: np.ndarray
    """Numbers of records that repeat another one, sorted."""
    splits: Mapping[str, float]
    digits: int
    """Of a source shard's number; a target shard's has its split's in front."""
    image_format: str
    """Of pictures that are encoded again."""
    signing: Signing | None = None
    """The operator's key, of content credentials."""
    damaged: frozenset[int] = frozenset()
    """The target's shards that are to be written again."""

    def exported(self, num_shards: int) -> np.ndarray:
        """(splits, source shards): from which generation each was exported, -1 for not at all."""
        done = np.full((len(self.splits), num_shards), -1, np.int32)
        for entry in self.target.entries():
            split, shard = divmod(entry["shard"], 10**self.digits)
            if entry["shard"] not in self.damaged:
                done[split, shard] = entry["generation"]
        return done

    def export(self, entry: Entry) -> None:
        """Export one source shard: a target shard for each split."""
        started = time.monotonic()
        parts: list[list[Row]] = [[] for _ in self.splits]
        data, number = self.source.data, entry["shard"]
        for row in self.source.format.read(data, number, schema=self.source_schema):
            if self._is_selected(row):
                parts[self._split_of(row["image_id"])].append(self._convert(row))
        for split, rows in enumerate(parts):
            facts = {
                "generation": entry["generation"],  # the source's: shows what was made again
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

    def write_card(self, counts: Mapping[str, int], lock: Lock) -> None:
        """Write the card of splits with so many records."""
        header = self.target.format.card(self.schema, self.image_format)
        license = lock.segments[-1].job["output"].get("license")
        card.write_exported(self.output.uri, header, counts, self.digits, license)

    def _is_selected(self, row: Row) -> bool:
        at = int(np.searchsorted(self.dropped_records, row["record"]))
        if at < len(self.dropped_records) and self.dropped_records[at] == row["record"]:
            return False
        if row["image"] is None and all(c.column != "status" for c in self.conditions):
            return False
        return all(condition.holds(row) for condition in self.conditions)

    def _split_of(self, image_id: str) -> int:
        digest = hashlib.sha256(f"split|{image_id}".encode()).digest()
        point = int.from_bytes(digest[:8], "big") / 2**64
        ends = list(itertools.accumulate(self.splits.values()))
        return next((n for n, end in enumerate(ends) if point < end), len(ends) - 1)

    def _convert(self, row: Row) -> Row:
        """The row with its picture as the target wants it."""
        if row["image"] is None:
            return row
        output, data = self.output, row["image"]["bytes"]
        changed: Row = {} if output.size is None else self._followed(row)
        if output.image_format or output.size or output.provenance.watermark:
            image = self._changed(row)
            text = parameters_text(row) if self.image_format == "png" else None
            data = encode_picture(image, self.image_format, output.quality, text)
            changed |= {"width": image.width, "height": image.height}
        if self.signing is not None:
            named = {name: row.get(name) for name in marks.RECORD}
            data = self.signing.sign(data, extension_of(data), named)
        if data is not row["image"]["bytes"]:
            changed["image"] = {"bytes": data, "path": None}
            changed["image_sha256"] = hashlib.sha256(data).hexdigest()
        return row | changed

    def _changed(self, row: Row) -> Image.Image:
        """The picture at the size of the output, with a watermark where that is asked."""
        output = self.output
        image: Image.Image = Image.open(io.BytesIO(row["image"]["bytes"]))
        if output.size is not None:
            image = _resized(image, output.size)
        return watermark.mark(image, row["image_id"]) if output.provenance.watermark else image

    def _followed(self, row: Row) -> Row:
        """The pictures that this one follows, as large as it, and still without loss."""
        found: Row = {}
        for name in pictures(self.source_schema)[1:]:
            if row.get(name) is not None:
                image: Image.Image = Image.open(io.BytesIO(row[name]["bytes"]))
                data = encode_picture(_resized(image, self.output.size or 0), "png", 100)
                found[name] = {"bytes": data, "path": None}
        return found

    def _store(self, number: int, rows: list[Row], facts: dict[str, Any]) -> None:
        target = self.target
        old = target.entry(number)
        is_current = old is not None and old["generation"] == facts["generation"]
        if is_current and number not in self.damaged:
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


def _resized(image: Image.Image, side: int) -> Image.Image:
    """With a longer side of so many pixels."""
    share = side / max(image.size)
    size = (max(1, round(image.width * share)), max(1, round(image.height * share)))
    return image.resize(size, Image.Resampling.LANCZOS)


def build(uri: str, lock: Lock, config: ExportConfig) -> ShardExporter:
    schema = data_set_schema(uri, lock)
    conditions = tuple(parse(text).typed(schema) for text in config.where)
    kept = _selected_columns(schema, config.columns)
    check_schema(config.output.format, kept)
    own = lock.segments[-1].job["output"]["image_format"]
    return ShardExporter(
        output=config.output,
        source=Manifest(uri, lock.format),
        target=Manifest(config.output.uri, config.output.format),
        source_schema=schema,
        schema=kept,
        conditions=conditions,
        dropped_records=np.empty(0, np.int64)
        if config.duplicates is None
        else table.repeated(uri, config.duplicates),
        splits=config.splits or {"train": 1.0},
        digits=len(str(max(0, lock.num_shards - 1))),
        image_format=config.output.image_format or own,
        signing=marks.load_signing(config.output.provenance),
    )


def _selected_columns(schema: pa.Schema, columns: tuple[str, ...]) -> pa.Schema:
    for name in columns:
        if name not in schema.names:
            raise BadInput(f"columns: there is no {name!r}; there are {', '.join(schema.names)}")
    wanted = {*columns, *REQUIRED_COLUMNS} if columns else set(schema.names)
    fields = [field for field in schema if field.name in wanted]
    features = {field.name: feature(field.type) for field in fields}
    return pa.schema(fields, {"huggingface": json.dumps({"info": {"features": features}})})
