"""Export: a finished data set's good records as another data set, chosen, split and converted.

Owns the keys, the order of events, the target's lock and card. Changes nothing in the source. What
becomes of a record is in `transfer`.
"""

import hashlib
import json
import os
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from pydantic import Field, field_validator
from tqdm import tqdm

from rayjobs import storage
from rayjobs.config import BadInput, Config, differences, load_config
from rayjobs.dataset.formats import check_schema
from rayjobs.dataset.lock import Lock, read_lock, snapshot_uri
from rayjobs.dataset.manifest import Entry, Manifest
from rayjobs.dataset.records import feature
from rayjobs.generation.prompts.snapshot import Snapshot
from rayjobs.generation.spec.lock import config_of, record_schema
from rayjobs.generation.tools.filters import parse
from rayjobs.generation.tools.transfer import ExportOutput, Transfer

THREADS = 3
NEEDED = ("image", "record", "prompt")
"""Columns that shards of some format are made of; they are always exported."""
TEXT = """---
{header}---
# Generated images

{num_records:,} images, exported by `rayjobs export`.

* Load them: `datasets.load_dataset(FOLDER)`, where FOLDER is this one; pictures come as images.
* `manifest/` holds the SHA-256 of every shard; `export.lock.json` says what was chosen and how.
"""


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
    try:
        return load_config(ExportConfig, os.devnull, overrides)
    except BadInput as error:
        raise BadInput(str(error).replace(f"{os.devnull}: ", "")) from None


def run(source_uri: str, config: ExportConfig) -> Summary:
    """Export every finished shard that is not exported yet, or was made again since.

    Raises BadInput when a condition or column does not fit the source, or when the target holds
    something else.
    """
    started = time.monotonic()
    storage.check(source_uri)
    storage.check(config.output.uri, write=True)
    lock = read_lock(source_uri)
    if lock is None:
        raise BadInput(f"{source_uri} is no data set: it has no spec.lock.json")
    export = _build(source_uri, lock, config)
    _enter(source_uri, lock, config)
    export.target.recover()
    export.target.compact()
    num_there = int(export.source.committed(lock.num_shards).sum())
    with tqdm(total=num_there, unit="shard", file=sys.stderr, disable=None) as bar:
        for _ in _each(export.shard, _missing(export, lock.num_shards, bar)):
            bar.update()
    return _finish(export, lock, started)


def _build(uri: str, lock: Lock, config: ExportConfig) -> Transfer:
    schema = _source_schema(uri, lock)
    conditions = tuple(parse(text).typed(schema) for text in config.where)
    kept = _kept(schema, config.columns)
    check_schema(config.output.format, kept)
    own = lock.segments[-1].job["output"]["image_format"]
    return Transfer(
        output=config.output,
        source=Manifest(uri, lock.format),
        target=Manifest(config.output.uri, config.output.format),
        source_schema=schema,
        schema=kept,
        conditions=conditions,
        dropped=_repeated(uri) if config.drop_duplicates else np.empty(0, np.int64),
        splits=config.splits or {"train": 1.0},
        digits=len(str(max(0, lock.num_shards - 1))),
        image_format=config.output.image_format or own,
    )


def _source_schema(uri: str, lock: Lock) -> pa.Schema:
    """The columns of all segments together; those that a segment lacks are null there."""
    schemas = [
        record_schema(config_of(segment, uri), Snapshot(snapshot_uri(uri, number)))
        for number, segment in enumerate(lock.segments)
    ]
    try:
        return pa.unify_schemas(schemas)
    except pa.ArrowException as error:
        raise BadInput(f"{uri}: its segments' columns do not go together: {error}") from None


def _kept(schema: pa.Schema, columns: tuple[str, ...]) -> pa.Schema:
    for name in columns:
        if name not in schema.names:
            raise BadInput(f"columns: there is no {name!r}; there are {', '.join(schema.names)}")
    wanted = {*columns, *NEEDED} if columns else set(schema.names)
    fields = [field for field in schema if field.name in wanted]
    features = {field.name: feature(field.type) for field in fields}
    return pa.schema(fields, {"huggingface": json.dumps({"info": {"features": features}})})


def _repeated(uri: str) -> np.ndarray:
    """The records of every group of near-duplicates but its first, sorted."""
    table = storage.join(uri, "duplicates.parquet")
    if not storage.exists(table):
        raise BadInput(f"drop_duplicates: {table} is missing; `rayjobs report {uri}` writes it")
    with storage.open_input(table) as file:
        found = pq.read_table(file, columns=["group", "record"])
    group, record = found["group"].to_numpy(), found["record"].to_numpy()
    order = np.lexsort([record, group])
    group, record = group[order], record[order]
    return np.sort(record[1:][group[1:] == group[:-1]])


def _enter(source_uri: str, lock: Lock, config: ExportConfig) -> None:
    """Write the target's lock, or find the same one; raises BadInput with the difference."""
    uri = config.output.uri
    if storage.exists(storage.join(uri, "spec.lock.json")):
        raise BadInput(f"{uri} holds a generated data set; choose another output.uri")
    wanted = _identity(source_uri, lock, config)
    lock_uri = storage.join(uri, "export.lock.json")
    data = json.dumps(wanted, indent=2, ensure_ascii=False).encode() + b"\n"
    if storage.create_bytes(lock_uri, data, storage.join(uri, "tmp")):
        return
    if changed := differences(json.loads(storage.read_bytes(lock_uri)), wanted):
        raise BadInput(
            f"{uri} holds another export; choose another output.uri, or go back to:\n"
            + "\n".join(changed)
        )


def _identity(source_uri: str, lock: Lock, config: ExportConfig) -> dict[str, Any]:
    """What decides the target, flat."""
    values = config.model_dump(mode="json")
    output = {f"output.{key}": v for key, v in values.pop("output").items() if key != "uri"}
    # Of equal shares in another order, other images would be in the splits.
    values["splits"] = [[name, share] for name, share in config.splits.items()]
    duplicates = None
    if config.drop_duplicates:
        digest = hashlib.sha256()
        with storage.open_input(storage.join(source_uri, "duplicates.parquet")) as table:
            while block := table.read(1 << 20):
                digest.update(block)
        duplicates = digest.hexdigest()
    source = {"source": lock.fingerprint, "duplicates_sha256": duplicates}
    return {"version": 1} | source | output | values


def _missing(export: Transfer, num_shards: int, bar: Any) -> Iterator[Entry]:
    """Entries of source shards that are not exported as they are now."""
    done = export.finished(num_shards)
    for entry in export.source.entries():
        if (done[:, entry["shard"]] != entry["generation"]).any():
            yield entry
        else:
            bar.update()


def _each(work: Callable[[Entry], None], items: Iterable[Entry]) -> Iterator[None]:
    """Work through the items on a few threads, of which none is far ahead of the others."""
    pending: deque[Future[None]] = deque()
    with ThreadPoolExecutor(THREADS, thread_name_prefix="exporting") as pool:
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) > 2 * THREADS:
                yield pending.popleft().result()
        for future in pending:
            yield future.result()


def _finish(export: Transfer, lock: Lock, started: float) -> Summary:
    counts, num_bytes = dict.fromkeys(export.splits, 0), 0
    export.target.compact()
    for entry in export.target.entries():
        counts[list(counts)[entry["shard"] // 10**export.digits]] += entry["rows"]
        num_bytes += entry["bytes"]
    _write_card(export, lock, counts)
    export.target.clean()
    return Summary(
        num_records=sum(counts.values()),
        num_missing=int((~export.source.committed(lock.num_shards)).sum()),
        num_bytes=num_bytes,
        splits=counts,
        seconds=time.monotonic() - started,
        output_uri=export.output.uri,
    )


def _write_card(export: Transfer, lock: Lock, counts: dict[str, int]) -> None:
    header = export.target.format.card(export.schema, export.image_format)
    (config,) = header["configs"]
    if set(export.splits) != {"train"}:
        config["data_files"] = [
            {"split": name, "path": _of_split(config["data_files"], split, export.digits)}
            for split, name in enumerate(counts)
            if counts[name]
        ]
    named = lock.segments[-1].job["output"].get("license")
    header = ({"license": named} if named else {}) | header | {"tags": ["synthetic"]}
    text = TEXT.format(
        header=yaml.safe_dump(header, sort_keys=False), num_records=sum(counts.values())
    )
    storage.write_bytes(storage.join(export.output.uri, "README.md"), text.encode())


def _of_split(patterns: str | list[str], split: int, digits: int) -> list[str]:
    """The patterns of a format's files, narrowed to the shards of one split."""
    first = f"{split * 10**digits:08d}"[:-digits]
    some = f"data/shard-{first}{'[0-9]' * digits}"
    every = [patterns] if isinstance(patterns, str) else patterns
    return [pattern.replace("data/*", some, 1) for pattern in every]
