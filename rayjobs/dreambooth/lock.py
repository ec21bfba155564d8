"""What a run is: its settings and its data, written down once, compared ever after.

Owns the run's lock and what may change between two starts of one run. Knows no torch and no Ray.
"""

import json
from typing import Any

from rayjobs import storage
from rayjobs.config import BadInput
from rayjobs.dreambooth.resolved import ResolvedRun

FILE = "run.lock.json"
FREE = ("workers", "checkpoint", "validation", "output", "trackers")
"""Keys that move no weight by more than rounding."""
FREE_IN = {
    "train": ("micro_batch_size", "gradient_checkpointing"),
    "model": ("uri", "device"),
    "instance": ("uri",),
    "prior": ("uri",),
}
"""Where things lie moves nothing either: what lies there is in the lock, as hashes."""


def describe(run: ResolvedRun) -> dict[str, Any]:
    """All that decides what is trained, whatever machine or folder it is on."""
    values = run.config.model_dump(mode="json")
    for key in FREE:
        values.pop(key)
    for key, names in FREE_IN.items():
        for name in names:
            values[key].pop(name)
    return {
        **values,
        "model_sha256": run.model_sha256,
        "photos": {photo.name: [photo.sha256, *photo.captions] for photo in run.photos},
        "priors": sorted(image.sha256 for image in run.class_images),
    }


def enter(uri: str, run: dict[str, Any]) -> None:
    """Begin a run, or go on with it. Raises BadInput, with the difference, when it is another."""
    lock = storage.join(uri, FILE)
    written = json.dumps(run, indent=1, ensure_ascii=False).encode()
    if storage.create_bytes(lock, written):
        return
    there = json.loads(storage.read_bytes(lock))
    changed = [
        f"  {key}: {_short(old)} there, {_short(new)} now"
        for key, old, new in _differences(there, run, "")
    ]
    if not changed:
        return
    name, now = there["run"]["name"], run["run"]["name"]
    if name != now:
        raise BadInput(f"{uri} holds the run {name!r}, not {now!r}; give another output.uri")
    raise BadInput(
        f"the run {name!r} in {uri} was begun with other settings; take them back, or give "
        "another run.name and output.uri:\n" + "\n".join(changed)
    )


def _differences(there: Any, now: Any, place: str) -> list[tuple[str, Any, Any]]:
    if isinstance(there, dict) and isinstance(now, dict):
        return [
            found
            for key in sorted(there.keys() | now.keys())
            for found in _differences(
                there.get(key), now.get(key), f"{place}.{key}" if place else key
            )
        ]
    return [] if there == now else [(place, there, now)]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) < 80 else f"{text[:77]}..."
