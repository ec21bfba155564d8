"""Export: a finished data set's good records as another data set, chosen, split and converted.

Owns the keys, the order of events, the target's lock and shard numbers, and what becomes of a
record. Changes nothing in the source.
"""

import hashlib
import io
import itertools
import json
import os
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from PIL import Image
from pydantic import Field, field_validator
from tqdm import tqdm

from rayjobs import storage
from rayjobs.config import BadInput, Config, differences, read_config
from rayjobs.dataset import lock as locks
from rayjobs.dataset.formats import check_schema
from rayjobs.dataset.inspection import inspect
from rayjobs.dataset.lock import Lock
from rayjobs.dataset.manifest import Entry, Manifest
from rayjobs.dataset.records import Row, canonical_json, feature
from rayjobs.generation.spec.lock import data_set_schema
from rayjobs.generation.tools.filters import Condition, parse
from rayjobs.images.encode import encode_picture
from rayjobs.images.parameters import parameters_text
from rayjobs.quality import duplicates
from rayjobs.reports import card

NUM_THREADS = 3
LOCK = "export.lock.json"
REQUIRED_COLUMNS = ("image", "record", "prompt")
"""Columns that shards of some format are made of; they are always exported."""


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


class ExportConfig(Config):
    output: ExportOutput
    where: tuple[str, ...] = ()
    """Conditions such as `clip_score >= 0.25`, all of which must hold. Failed records are left out
    unless one of them asks for `status`."""
    splits: dict[str, float] = Field(default_factory=dict)
    """Shares by name, such as {train: 0.9, test: 0.1}; an image is always in the same one."""
    columns: tuple[str, ...] = ()
    """Keep only these, and image, record and prompt; without any, all."""
    drop_duplicates: bool = False
    """Keep only the first picture of each group in the source's duplicates.parquet."""

    @field_validator("where", "columns", mode="before")
    @classmethod
    def _one_or_more(cls, texts: Any) -> Any:
        return (texts,) if isinstance(texts, str) else texts

    @field_validator("where")
    @classmethod
    def _readable(cls, where: tuple[str, ...]) -> tuple[str, ...]:
        for text in where:
            parse(text)
        return where

    @field_validator("splits")
    @classmethod
    def _whole(cls, splits: dict[str, float]) -> dict[str, float]:
        for name, share in splits.items():
            if not re.fullmatch(r"\w+", name):
                raise ValueError(f"{name!r} is no name of a split; use letters, digits and _")
            if not 0 < share <= 1:
                raise ValueError(f"{name} is {share:g}; a share is above 0 and at most 1")
        if splits and abs(sum(splits.values()) - 1) > 1e-9:
            raise ValueError(f"the shares sum to {sum(splits.values()):g}, not to 1")
        return splits


@dataclass(frozen=True)
class Summary:
    """What the target holds now, and how many of the source's shards are not finished."""

    num_records: int
    num_missing: int
    num_bytes: int
    splits: dict[str, int]
    seconds: float
    output_uri: str


def load(overrides: list[str]) -> ExportConfig:
    """The configuration that `a.b=value` overrides alone describe."""
    return read_config(ExportConfig, {}, overrides)


def run(source_uri: str, config: ExportConfig, repair: bool = False) -> Summary:
    """Export every finished shard that is not exported yet, or was made again since.

    With `repair` the target's shards that are damaged are exported again, too.

    Raises BadInput when a condition or column does not fit the source, or when the target holds
    something else.
    """
    started = time.monotonic()
    storage.check(source_uri)
    storage.check(config.output.uri, write=True)
    lock = locks.read_lock(source_uri)
    if lock is None:
        raise BadInput(f"{source_uri} is no data set: it has no spec.lock.json")
    exporter = _build(source_uri, lock, config)
    _ensure_lock(source_uri, lock, config)
    if not storage.exists(storage.join(config.output.uri, "README.md")):
        exporter.write_card(dict.fromkeys(exporter.splits, 1), lock)
    exporter.target.recover()
    if repair:
        exporter = replace(exporter, damaged=_damaged(exporter.target))
    exporter.target.compact()
    num_committed = int(exporter.source.committed(lock.num_shards).sum())
    with tqdm(total=num_committed, unit="shard", file=sys.stderr, disable=None) as bar:
        for _ in _map_threads(exporter.export, _outdated(exporter, lock.num_shards, bar)):
            bar.update()
    return _finish(exporter, lock, started)


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


def _build(uri: str, lock: Lock, config: ExportConfig) -> ShardExporter:
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
        dropped_records=duplicates.repeated(uri)
        if config.drop_duplicates
        else np.empty(0, np.int64),
        splits=config.splits or {"train": 1.0},
        digits=len(str(max(0, lock.num_shards - 1))),
        image_format=config.output.image_format or own,
    )


def _selected_columns(schema: pa.Schema, columns: tuple[str, ...]) -> pa.Schema:
    for name in columns:
        if name not in schema.names:
            raise BadInput(f"columns: there is no {name!r}; there are {', '.join(schema.names)}")
    wanted = {*columns, *REQUIRED_COLUMNS} if columns else set(schema.names)
    fields = [field for field in schema if field.name in wanted]
    features = {field.name: feature(field.type) for field in fields}
    return pa.schema(fields, {"huggingface": json.dumps({"info": {"features": features}})})


def _ensure_lock(source_uri: str, lock: Lock, config: ExportConfig) -> None:
    """Write the target's lock, or find the same one; raises BadInput with the difference."""
    uri = config.output.uri
    if storage.exists(storage.join(uri, "spec.lock.json")):
        raise BadInput(f"{uri} holds a generated data set; choose another output.uri")
    wanted = _identity(source_uri, lock, config)
    lock_uri = storage.join(uri, LOCK)
    data = json.dumps(wanted, indent=2, ensure_ascii=False).encode() + b"\n"
    if storage.create_bytes(lock_uri, data, storage.join(uri, "tmp")):
        return
    if changed := differences(read_lock(uri), wanted):
        raise BadInput(
            f"{uri} holds another export; choose another output.uri, or go back to:\n"
            + "\n".join(changed)
        )


def read_lock(uri: str) -> dict[str, Any] | None:
    """What an export was made of and how, flat by key; None where there is none."""
    lock_uri = storage.join(uri, LOCK)
    if not storage.exists(lock_uri):
        return None
    try:
        lock: dict[str, Any] = json.loads(storage.read_bytes(lock_uri))
        return lock | {"output.format": str(lock["output.format"])}
    except (ValueError, KeyError, TypeError):
        raise BadInput(f"{lock_uri} cannot be read; put it back from a copy") from None


def _identity(source_uri: str, lock: Lock, config: ExportConfig) -> dict[str, Any]:
    """What decides the target, by key."""
    values = config.model_dump(mode="json")
    output = {f"output.{key}": v for key, v in values.pop("output").items() if key != "uri"}
    # Of equal shares in another order, other images would be in the splits.
    values["splits"] = [[name, share] for name, share in config.splits.items()]
    table_sha256 = duplicates.table_sha256(source_uri) if config.drop_duplicates else None
    source = {"source": lock.fingerprint, "duplicates_sha256": table_sha256}
    return {"version": 1} | source | output | values


def _damaged(target: Manifest) -> frozenset[int]:
    """The target's damaged shards; entries that cannot be read are removed."""
    found: set[int] = set()
    for _, faults in inspect(target, 0, lambda shard: None):
        for fault in faults:
            if fault.manifest_file is not None:
                storage.remove(target.file_uri(fault.manifest_file))
            if fault.shard is not None:
                found.add(fault.shard)
    return frozenset(found)


def _outdated(exporter: ShardExporter, num_shards: int, bar: Any) -> Iterator[Entry]:
    """Entries of source shards that are not exported as they are now."""
    done = exporter.exported(num_shards)
    for entry in exporter.source.entries():
        if (done[:, entry["shard"]] != entry["generation"]).any():
            yield entry
        else:
            bar.update()


def _map_threads(work: Callable[[Entry], None], items: Iterable[Entry]) -> Iterator[None]:
    """Work through the items on a few threads, of which none is far ahead of the others."""
    pending: deque[Future[None]] = deque()
    with ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="exporting") as pool:
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) > 2 * NUM_THREADS:
                yield pending.popleft().result()
        for future in pending:
            yield future.result()


def _finish(exporter: ShardExporter, lock: Lock, started: float) -> Summary:
    counts, num_bytes = dict.fromkeys(exporter.splits, 0), 0
    exporter.target.compact()
    for entry in exporter.target.entries():
        counts[list(counts)[entry["shard"] // 10**exporter.digits]] += entry["rows"]
        num_bytes += entry["bytes"]
    exporter.write_card(counts, lock)
    exporter.target.clean()
    return Summary(
        num_records=sum(counts.values()),
        num_missing=int((~exporter.source.committed(lock.num_shards)).sum()),
        num_bytes=num_bytes,
        splits=counts,
        seconds=time.monotonic() - started,
        output_uri=exporter.output.uri,
    )
