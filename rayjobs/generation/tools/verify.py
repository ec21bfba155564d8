"""Verification of a data set: every byte is read again, some records are generated again.

Owns the checks and their findings. Changes nothing.
"""

import hashlib
import random
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from tqdm import tqdm

from rayjobs import storage
from rayjobs.config import BadInput
from rayjobs.dataset.lock import Lock, Segment, read_lock
from rayjobs.dataset.manifest import Entry, Manifest
from rayjobs.generation.config import GenerateConfig
from rayjobs.generation.spec.lock import config_of, open_spec, record_of, record_schema

READERS = 4
MAX_FAULTS_SHOWN = 100
CHECKED_COLUMNS = ("record", "status", "image", "image_id", "image_sha256", "prompt", "seed")


@dataclass
class Findings:
    """What was looked at, and what is wrong with it."""

    num_shards: int = 0
    num_records: int = 0
    num_missing: int = 0
    """Shards that are not finished: no fault, `generate` goes on with them."""
    num_regenerated: int = 0
    faults: list[str] = field(default_factory=list)


def verify(uri: str, regenerate: int = 0, seed: int | None = None) -> Findings:
    """Read every finished shard again, then make `regenerate` random records again.

    Raises BadInput when there is no data set, or when this machine cannot make the same bits.
    """
    storage.check(uri)
    lock = read_lock(uri)
    if lock is None:
        raise BadInput(f"{uri} is no data set: it has no spec.lock.json")
    if regenerate:
        _check_class(uri, lock)
    findings, manifest = Findings(), Manifest(uri, lock.format)
    entries = list(manifest.entries())
    findings.num_missing = lock.num_shards - len(entries)
    _check_strays(manifest, entries, findings)
    with ThreadPoolExecutor(READERS) as pool:
        checked = pool.map(
            lambda entry: (entry, list(_shard_faults(lock, manifest, entry))), entries
        )
        for entry, faults in tqdm(checked, "shards", len(entries), file=sys.stderr, disable=None):
            findings.num_shards += 1
            findings.num_records += entry["rows"]
            findings.faults += faults
    if regenerate and entries and not findings.faults:
        rng = random.Random(seed)
        some = rng.choices(entries, [entry["rows"] for entry in entries], k=regenerate)
        for number, segment in enumerate(lock.segments):
            mine = [entry for entry in some if entry["shard"] in segment.shards]
            if mine:
                _regenerate(_config(uri, lock, number), (number, segment), mine, rng, findings)
    return findings


def _check_strays(manifest: Manifest, entries: list[Entry], findings: Findings) -> None:
    """Files under data/ that no entry names."""
    known = {entry["file"].removeprefix("data/") for entry in entries}
    for name in storage.list_files(manifest.data):
        if name.split("/")[0] not in known:
            findings.faults.append(f"data/{name}: no manifest entry names it")


def _shard_faults(lock: Lock, manifest: Manifest, entry: Entry) -> Iterator[str]:
    shard = entry["shard"]
    numbers = lock.segment_of(shard).records_of(shard)
    sha256 = manifest.sha256(shard)
    if sha256 is None:
        yield f"shard {shard}: {entry['file']} is missing"
        return
    if sha256 != entry["sha256"]:
        difference = f"has SHA-256 {sha256[:12]}, not {entry['sha256'][:12]}"
        yield f"shard {shard}: {entry['file']} {difference}"
    seen = []
    try:
        for row in manifest.format.read(manifest.data, shard, CHECKED_COLUMNS):
            seen.append(row["record"])
            yield from (f"shard {shard}, record {row['record']}: {f}" for f in _row_faults(row))
    except Exception as error:  # damaged bytes break a reader in any way
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        yield f"shard {shard}: cannot be read on after record {seen[-1] if seen else '-'}: {reason}"
        return
    if seen != list(numbers):
        yield f"shard {shard}: holds records {_span(seen)}, not {numbers[0]} .. {numbers[-1]}"


def _row_faults(row: dict[str, Any]) -> Iterator[str]:
    if row["status"] != "ok":
        return
    if row["image"] is None:
        yield "there is no picture"
    elif hashlib.sha256(row["image"]["bytes"]).hexdigest() != row["image_sha256"]:
        yield "the picture is not the one that was made (its SHA-256 differs)"


def _span(numbers: list[int]) -> str:
    return f"{numbers[0]} .. {numbers[-1]} ({len(numbers)})" if numbers else "none"


def _check_class(uri: str, lock: Lock) -> None:
    from rayjobs.generation.spec import determinism

    config = _config(uri, lock, 0)
    determinism.check_same(lock.determinism, determinism.current(config), allowed=False)


def _config(uri: str, lock: Lock, segment: int) -> GenerateConfig:
    """A segment's job, to be run here with the threads that its workers had."""
    config = config_of(lock.segments[segment], uri)
    workers = config.workers.model_copy(update={"num_cpus": lock.determinism["threads"]})
    return config.model_copy(update={"workers": workers})


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
        differing = [name for name in schema.names if row.get(name) != old.get(name)]
        if differing:
            shard = segment.shard_of(record.number)
            findings.faults.append(
                f"shard {shard}, record {record.number}: made again it differs in "
                + ", ".join(differing)
            )


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
