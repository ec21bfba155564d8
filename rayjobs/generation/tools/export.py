"""Export: a finished data set's good records as another data set, chosen, split and converted.

Owns the order of events and the target's lock. Changes nothing in the source.
"""

import json
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from tqdm import tqdm

from rayjobs import storage
from rayjobs.config import BadInput, differences, read_config
from rayjobs.dataset import lock as locks
from rayjobs.dataset.inspection import inspect
from rayjobs.dataset.lock import Lock
from rayjobs.dataset.manifest import Entry, Manifest
from rayjobs.generation.tools import hub
from rayjobs.generation.tools.export_config import ExportConfig, ExportOutput
from rayjobs.generation.tools.exporter import ShardExporter, build
from rayjobs.provenance.keys import Provenance
from rayjobs.quality import table

NUM_THREADS = 3
LOCK = "export.lock.json"


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

    To the Hub it is by way of a local folder. With `repair` the target's shards that are damaged
    are exported again, too.

    Raises BadInput when a condition or column does not fit the source, or when the target holds
    something else.
    """
    uri, staging = config.output.uri, config.output.staging
    if staging is None:
        return _export(source_uri, config, repair)
    hub.ensure(uri, config.output.private)
    local = ExportOutput.model_validate(
        config.output.model_dump() | {"uri": storage.absolute(staging), "staging": None}
    )
    done = _export(source_uri, config.model_copy(update={"output": local}), repair)
    hub.upload(uri, local.uri)
    return replace(done, output_uri=uri)


def _export(source_uri: str, config: ExportConfig, repair: bool) -> Summary:
    started = time.monotonic()
    storage.check(source_uri)
    storage.check(config.output.uri, write=True)
    lock = locks.read_lock(source_uri)
    if lock is None:
        raise BadInput(f"{source_uri} is no data set: it has no spec.lock.json")
    exporter = build(source_uri, lock, config)
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
    for key in ("uri", "staging", "private", "provenance"):
        values["output"].pop(key)
    output = {f"output.{key}": v for key, v in values.pop("output").items()}
    output |= _marks(config)
    # Of equal shares in another order, other images would be in the splits.
    values["splits"] = [[name, share] for name, share in config.splits.items()]
    table_sha256 = table.sha256(source_uri, name) if (name := config.duplicates) else None
    source = {"source": lock.fingerprint, "duplicates_sha256": table_sha256}
    return {"version": 1} | source | output | values


def _marks(config: ExportConfig) -> dict[str, Any]:
    """What every picture has to carry; wherever the key lies, and not where nothing was asked."""
    asked = config.output.provenance
    if asked == Provenance():
        return {}
    return {"output.provenance": {"marked": asked.watermark, "signed": asked.key is not None}}


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
    rows: dict[str, dict[int, int]] = {name: {} for name in exporter.splits}
    num_bytes = 0
    exporter.target.compact()
    for entry in exporter.target.entries():
        rows[list(rows)[entry["shard"] // 10**exporter.digits]][entry["shard"]] = entry["rows"]
        num_bytes += entry["bytes"]
    counts = {name: sum(shards.values()) for name, shards in rows.items()}
    exporter.target.format.seal(exporter.output.uri, exporter.schema, rows)
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
