"""The lock of a data set: its resolved jobs, written before anything else.

Owns its segments, the arithmetic of their shards and records, their fingerprint, and the comparison
with a later run's job. Knows a job only as the keys and values that it was resolved to.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import Field

from rayjobs import storage
from rayjobs.config import BadInput, Config, differences
from rayjobs.dataset.records import ENGINE_VERSION, canonical_json

LOCATIONS = ("prompts.uri", "prompts.column", "model.uri", "model.config", "init.uri")
LOCATIONS += ("model.base", "model.revision")
LOCATIONS += (
    "controls",
    "ip_adapters",
    "passes",
    "model.loras",
    "model.words",
    "quality.clip",
    "quality.aesthetic",
    "quality.safety",
    "quality.pick",
    "quality.hps",
    "quality.caption",
)
"""Keys that may change, since the lock holds hashes of what lies there."""


class Segment(Config):
    """One job of a data set, resolved: its records are numbered on from the segment before."""

    job: dict[str, Any]
    """The configuration without what leaves the result alone."""
    prompts_sha256: str
    """Of the prompts' snapshot."""
    num_prompts: int
    init_sha256: str | None = None
    """Of the snapshot of the init images' names."""
    model_name: str
    model_sha256: str
    loras_sha256: tuple[str, ...] = ()
    controls_sha256: tuple[str, ...] = Field(default=(), exclude_if=lambda given: not given)
    """Of ControlNets and of the pictures that all records follow, with their settings."""
    ip_adapters_sha256: tuple[str, ...] = Field(default=(), exclude_if=lambda given: not given)
    """Of IP-Adapters with their encoders, likewise."""
    passes_sha256: tuple[str, ...] = Field(default=(), exclude_if=lambda given: not given)
    """Of the passes' settings, with the hashes of models of their own."""
    scorers_sha256: dict[str, str] = Field(default_factory=dict)
    guided: bool
    """Whether any record may use guidance: it decides the shape of every UNet call."""
    engine_version: int = ENGINE_VERSION
    sources: dict[str, str] = Field(default_factory=dict)
    """State of the files that prompts and init images came from: have they changed?"""
    first_prompt: int = 0
    """The records begin at this prompt: those before are in an earlier segment."""
    first_seed: int = 0
    """The records begin at this one of each prompt's seeds: those before are in an earlier one."""
    first_record: int = 0
    num_records: int
    first_shard: int = 0
    num_shards: int

    @property
    def shards(self) -> range:
        return range(self.first_shard, self.first_shard + self.num_shards)

    @property
    def records(self) -> range:
        return range(self.first_record, self.first_record + self.num_records)

    @property
    def images_per_shard(self) -> int:
        return int(self.job["output"]["images_per_shard"])

    def records_of(self, shard: int) -> range:
        """The records of one of its shards."""
        start = self.first_record + (shard - self.first_shard) * self.images_per_shard
        return range(start, min(start + self.images_per_shard, self.records.stop))

    def shard_of(self, record: int) -> int:
        return self.first_shard + (record - self.first_record) // self.images_per_shard

    def count_records(self, shards: Sequence[int] | np.ndarray) -> int:
        """Records of some of its shards, in ascending order: only the last may be a short one."""
        if not len(shards):
            return 0
        return (len(shards) - 1) * self.images_per_shard + len(self.records_of(int(shards[-1])))

    def identity(self) -> dict[str, Any]:
        """What decides the records of the whole job, wherever its files lie; flat, by key."""
        parts = self.model_dump(
            mode="json",
            include={"job", "prompts_sha256", "num_prompts", "init_sha256"}
            | {"model_sha256", "loras_sha256", "controls_sha256", "ip_adapters_sha256"}
            | {"passes_sha256", "scorers_sha256", "guided", "engine_version"},
        )
        flat = _flat(parts)
        return {k: v for k, v in flat.items() if k.removeprefix("job.") not in LOCATIONS}


class Lock(Config):
    """What a data set is made of."""

    segments: tuple[Segment, ...]
    determinism: dict[str, Any]
    """The class of the workers that began it."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 over what decides the records, wherever the data set lies."""
        parts = [s.identity() | {"box": [s.first_prompt, s.first_seed]} for s in self.segments]
        return hashlib.sha256(canonical_json(parts)).hexdigest()

    @property
    def num_records(self) -> int:
        return sum(segment.num_records for segment in self.segments)

    @property
    def num_shards(self) -> int:
        return sum(segment.num_shards for segment in self.segments)

    @property
    def format(self) -> str:
        return str(self.segments[0].job["output"]["format"])

    def segment_of(self, shard: int) -> Segment:
        """The segment that a shard belongs to."""
        return next(segment for segment in self.segments if shard in segment.shards)

    def records_of(self, shard: int) -> range | None:
        """The records of a shard; None for one that is of no segment."""
        found = (segment for segment in self.segments if shard in segment.shards)
        segment = next(found, None)
        return None if segment is None else segment.records_of(shard)

    def segment_of_record(self, record: int) -> Segment:
        """The segment that a record belongs to."""
        return next(segment for segment in self.segments if record in segment.records)


def lock_uri(output_uri: str) -> str:
    return storage.join(output_uri, "spec.lock.json")


def snapshot_uri(output_uri: str, segment: int) -> str:
    return storage.join(output_uri, "prompts", f"segment-{segment:03d}.parquet")


def names_uri(output_uri: str, segment: int) -> str:
    """The snapshot of a segment's init images' names."""
    return storage.join(output_uri, "prompts", f"segment-{segment:03d}-init.parquet")


def read_lock(output_uri: str) -> Lock | None:
    """The data set's lock, or None when there is none yet."""
    uri = lock_uri(output_uri)
    if not storage.exists(uri):
        return None
    try:
        whole = json.loads(storage.read_bytes(uri))
        return Lock.model_validate({k: whole[k] for k in ("segments", "determinism")})
    except (KeyError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"{uri} cannot be read: {reason}; put it back from a copy") from None


def create_lock(lock: Lock, output_uri: str) -> bool:
    """Write the lock of a new data set; False when another run was first."""
    return storage.create_bytes(lock_uri(output_uri), _encoded(lock), _staging(output_uri))


def replace_lock(lock: Lock, mark: str, output_uri: str) -> bool:
    """Write a lock with one segment more, unless it changed since `mark` was its etag."""
    uri = lock_uri(output_uri)
    return storage.replace_bytes(uri, _encoded(lock), mark, _staging(output_uri))


def find_segment(lock: Lock, wanted: Segment, output_uri: str) -> int:
    """The number of the segment that is the wanted job.

    Raises BadInput with the difference from the last segment when there is none.
    """
    for number, segment in enumerate(lock.segments):
        if segment.identity() == wanted.identity():
            return number
    changed = differences(lock.segments[-1].identity(), wanted.identity())
    raise BadInput(
        f"{output_uri} holds another job; choose another output.uri, append this one with --extend,"
        " or go back to:\n" + "\n".join(changed)
    )


def _encoded(lock: Lock) -> bytes:
    whole = {"version": 2, "fingerprint": lock.fingerprint} | lock.model_dump(mode="json")
    return json.dumps(whole, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"


def _staging(output_uri: str) -> str:
    return storage.join(output_uri, "tmp")


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, child in value.items():
        flat |= _flat(child, f"{prefix}.{key}" if prefix else key)
    return flat
