"""A run's lock: its settings and data, written at its start and compared at every later one.

Owns the run's lock and what may change between two starts of one run. Knows no torch and no Ray.
"""

import json
from typing import Any

from rayjobs import storage
from rayjobs.config import BadInput, differences
from rayjobs.dreambooth.resolved import ResolvedRun

FILE = "run.lock.json"
IGNORED_SECTIONS = ("workers", "checkpoint", "validation", "output", "trackers")
"""Keys that change no weight by more than rounding."""
IGNORED_KEYS = {
    "train": ("micro_batch_size", "gradient_checkpointing"),
    "model": ("uri", "base", "revision", "device"),
    "instance": ("uri",),
    "prior": ("uri",),
}
"""Locations change no weight either: the lock has the hashes of what lies there."""


def describe(run: ResolvedRun) -> dict[str, Any]:
    """All that decides what is trained, whatever machine or folder it is on."""
    values = run.config.model_dump(mode="json")
    for key in IGNORED_SECTIONS:
        values.pop(key)
    for key, names in IGNORED_KEYS.items():
        for name in names:
            values[key].pop(name, None)
    return {
        **values,
        "model_sha256": run.model_sha256,
        "photos": {photo.name: [photo.sha256, *photo.captions] for photo in run.photos},
        "priors": sorted(image.sha256 for image in run.class_images),
    }


def enter(uri: str, run: dict[str, Any]) -> None:
    """Begin a run, or go on with it. Raises BadInput, with the difference, when it is another."""
    written = json.dumps(run, indent=1, ensure_ascii=False).encode()
    if not storage.create_bytes(storage.join(uri, FILE), written):
        compare(uri, run)


def compare(uri: str, run: dict[str, Any], without: tuple[str, ...] = ()) -> None:
    """Raise BadInput, with the difference, when the folder holds another run.

    Facts named in `without` are passed over: those that are not known before there is work.
    """
    there = json.loads(storage.read_bytes(storage.join(uri, FILE)))
    before, after = ({k: v for k, v in x.items() if k not in without} for x in (there, run))
    changed = differences(before, after)
    if not changed:
        return
    name, now = there["run"]["name"], run["run"]["name"]
    if name != now:
        raise BadInput(f"{uri} holds the run {name!r}, not {now!r}; give another output.uri")
    raise BadInput(
        f"the run {name!r} in {uri} was begun with other settings; take them back, or give "
        "another run.name and output.uri:\n" + "\n".join(changed)
    )
