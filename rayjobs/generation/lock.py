"""The spec lock: what exactly a data set is made of, written before anything else.

Owns the resolved job, its fingerprint and the comparison with what a later run asks for.
"""

import hashlib
import json
from typing import Any

from rayjobs import storage
from rayjobs.config import BadInput, Config
from rayjobs.generation.config import GenerateConfig
from rayjobs.records import ENGINE_VERSION, canonical_json

FREE = ("workers",)
"""Parts of a configuration that change how a job runs, but not what it makes."""


class Lock(Config):
    """One segment of a data set, resolved."""

    job: dict[str, Any]
    """The configuration without what leaves the result alone."""
    prompts_sha256: str
    snapshot_uri: str
    num_prompts: int
    init_images: tuple[str, ...]
    model_name: str
    model_sha256: str
    guided: bool
    """Whether any record may use guidance: it decides the shape of every UNet call."""
    num_records: int
    num_shards: int
    engine_version: int = ENGINE_VERSION
    libraries: dict[str, str]
    """Versions that the determinism class is made of."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 over what decides the records, wherever the data set lies."""
        parts = self.model_dump(mode="json", exclude={"snapshot_uri", "libraries"})
        return hashlib.sha256(canonical_json(parts)).hexdigest()


def job_part(config: GenerateConfig) -> dict[str, Any]:
    whole = config.model_dump(mode="json", exclude=set(FREE))
    whole["output"].pop("uri")
    whole["model"].pop("device")
    return whole


def lock_uri(output_uri: str) -> str:
    return storage.join(output_uri, "spec.lock.json")


def read_lock(output_uri: str) -> Lock | None:
    """The data set's lock, or None when there is none yet."""
    uri = lock_uri(output_uri)
    if not storage.exists(uri):
        return None
    whole = json.loads(storage.read_bytes(uri))
    place = snapshot_uri(storage.absolute(output_uri))
    return Lock.model_validate(whole["segments"][-1] | {"snapshot_uri": place})


def write_lock(lock: Lock, output_uri: str) -> None:
    segment = lock.model_dump(mode="json", exclude={"snapshot_uri"})
    whole = {"version": 1, "fingerprint": lock.fingerprint, "segments": [segment]}
    data = json.dumps(whole, indent=2, sort_keys=True, ensure_ascii=False)
    storage.write_bytes(lock_uri(output_uri), data.encode() + b"\n")


def snapshot_uri(output_uri: str) -> str:
    return storage.join(output_uri, "prompts", "segment-000.parquet")


def check_same(found: Lock, wanted: Lock, output_uri: str) -> None:
    """Raise BadInput, with the difference, when a data set was begun as another job."""
    if found.fingerprint == wanted.fingerprint:
        return
    before, after = (
        _flat(lock.model_dump(mode="json", exclude={"snapshot_uri", "libraries"}))
        for lock in (found, wanted)
    )
    changed = [
        f"  {key}: {before.get(key)!r} there, {after.get(key)!r} now"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]
    raise BadInput(
        f"{output_uri} holds another job; choose another output.uri, or go back to:\n"
        + "\n".join(changed)
    )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, child in value.items():
        flat |= _flat(child, f"{prefix}.{key}" if prefix else key)
    return flat
