"""Verification of a data set or an export: every byte is read again, some records are made again.

Owns the findings and the comparison of what is made again. Changes nothing.
"""

import random
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from tqdm import tqdm

from rayjobs import storage
from rayjobs.config import BadInput
from rayjobs.dataset.inspection import Fault, inspect, inspect_snapshots
from rayjobs.dataset.lock import Lock, Segment, read_lock
from rayjobs.dataset.manifest import Entry, Manifest
from rayjobs.generation.config import GenerateConfig
from rayjobs.generation.spec.lock import config_again, open_spec, record_of, record_schema
from rayjobs.generation.spec.origin import Origin
from rayjobs.generation.tools import export
from rayjobs.provenance import marks

MAX_FAULTS_SHOWN = 100


@dataclass
class Findings:
    """What was looked at, and what is wrong with it."""

    num_shards: int = 0
    num_records: int = 0
    num_missing: int = 0
    """Shards that are not finished: no fault, `generate` goes on with them."""
    num_regenerated: int = 0
    faults: list[str] = field(default_factory=list)
    way_out: str = ""
    """The command that mends the faults."""


def verify(uri: str, regenerate: int = 0, seed: int | None = None) -> Findings:
    """Read every finished shard again, then make `regenerate` random records again.

    Raises BadInput when there is no data set, or when this machine cannot make the same bits.
    """
    storage.check(uri)
    lock = read_lock(uri)
    if lock is None:
        return _verify_export(uri, regenerate)
    if regenerate:
        _check_class(uri, lock)
    findings = Findings(way_out=f"rayjobs repair {uri}")
    findings.faults += [fault.text for fault in inspect_snapshots(uri, lock)]
    origin, manifest = Origin(uri, lock), Manifest(uri, lock.format)
    doubt, look = (
        None if findings.faults else origin.doubt,
        origin.look if origin.is_marked else None,
    )
    checked = inspect(manifest, lock.num_shards, lock.records_of, doubt, look)
    entries = _gather(checked, lock.num_shards, findings)
    findings.num_missing = lock.num_shards - len(entries)
    if regenerate and entries and not findings.faults:
        rng = random.Random(seed)
        some = rng.choices(entries, [entry["rows"] for entry in entries], k=regenerate)
        for number, segment in enumerate(lock.segments):
            mine = [entry for entry in some if entry["shard"] in segment.shards]
            if mine:
                _regenerate(config_again(uri, lock, number), (number, segment), mine, rng, findings)
    return findings


def _verify_export(uri: str, regenerate: int) -> Findings:
    lock = export.read_lock(uri)
    if lock is None:
        raise BadInput(f"{uri} is no data set: it has no spec.lock.json and no export.lock.json")
    if regenerate:
        raise BadInput(f"{uri} is an export; --regenerate is for the data set that it is of")
    findings = Findings(way_out="the same `rayjobs export` command with --repair")
    asked = lock.get("output.provenance") or {}
    if asked.get("signed"):
        marks.check_library()
    look = partial(marks.faults, **asked) if asked else None
    manifest = Manifest(uri, lock["output.format"])
    _gather(inspect(manifest, 0, lambda shard: None, None, look), 0, findings)
    return findings


def _gather(
    checked: Iterable[tuple[Entry | None, list[Fault]]], num_shards: int, findings: Findings
) -> list[Entry]:
    """The entries of finished shards, with all that is wrong in the findings."""
    entries = []
    for entry, faults in tqdm(checked, "shards", num_shards or None, file=sys.stderr, disable=None):
        findings.faults += [fault.text for fault in faults]
        if entry is not None:
            entries.append(entry)
            findings.num_shards += 1
            findings.num_records += entry["rows"]
    return entries


def _check_class(uri: str, lock: Lock) -> None:
    from rayjobs.generation.spec import determinism

    config = config_again(uri, lock, 0)
    determinism.check_same(lock.determinism, determinism.current(config), allowed=False)


def _regenerate(
    config: GenerateConfig,
    numbered: tuple[int, Segment],
    entries: list[Entry],
    rng: random.Random,
    findings: Findings,
) -> None:
    """Make random records of a segment again and compare them bit by bit."""
    from rayjobs.generation.spec import determinism
    from rayjobs.generation.worker.generator import RecordGenerator

    number, segment = numbered
    determinism.pin(config.workers)
    spec = open_spec(config, segment, number)
    schema = record_schema(config, spec.rows)
    manifest = Manifest(config.output.uri, config.output.format)
    rows = _choose(manifest, entries, schema, rng)
    generator = RecordGenerator(config, segment.model_name, segment.guided)
    again = (replace(record_of(spec, segment, k), seed=row["seed"]) for k, row in rows.items())
    for record, row in generator.generate(again):
        findings.num_regenerated += 1
        old = rows[record.number]
        differing = [n for n in schema.names if not _is_same(row.get(n), old.get(n))]
        if differing:
            shard = segment.shard_of(record.number)
            findings.faults.append(
                f"shard {shard}, record {record.number}: made again it differs in "
                + ", ".join(differing)
            )


def _is_same(a: Any, b: Any) -> bool:
    """Also where both are NaN, which a prompt file may pass through."""
    return bool(a == b) or (a != a and b != b)


def _choose(
    manifest: Manifest, entries: list[Entry], schema: Any, rng: random.Random
) -> dict[int, dict[str, Any]]:
    """As many random rows of each shard as it was chosen, by record."""
    times: dict[int, int] = {}
    for entry in entries:
        times[entry["shard"]] = times.get(entry["shard"], 0) + 1
    chosen = {}
    for shard, count in times.items():
        rows = list(manifest.format.read(manifest.data, shard, schema=schema))
        for row in rng.sample(rows, min(count, len(rows))):
            chosen[row["record"]] = row
    return chosen
