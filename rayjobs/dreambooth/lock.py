"""A run's lock: its settings and data, written at its start and compared at every later one.

Owns the run's lock and what may change between two starts of one run. Knows no torch and no Ray.
"""

import json
from collections.abc import Callable
from typing import Any, TypeVar

from rayjobs import storage
from rayjobs.config import BadInput, differences
from rayjobs.dreambooth.config import DreamBoothConfig
from rayjobs.dreambooth.data.photos import Photo, Subject
from rayjobs.dreambooth.resolved import ResolvedRun
from rayjobs.models import exports

T = TypeVar("T")
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
STEPLESS_SCHEDULES = ("constant", "constant_with_warmup")
"""Of the learning rate, for which N steps begin as 2N steps do."""


def describe(run: ResolvedRun) -> dict[str, Any]:
    """All that decides what is trained, whatever machine or folder it is on."""
    values = run.config.model_dump(mode="json")
    for key in IGNORED_SECTIONS:
        values.pop(key)
    for key, names in IGNORED_KEYS.items():
        for name in names:
            values[key].pop(name, None)
    for concept in values["concepts"]:
        del concept["uri"], concept["class_uri"]
    masks = {}
    if run.config.train.masks == "files":
        masks = {"masks": photo_names(run, lambda photo: photo.mask_sha256)}
    return {
        **values,
        **masks,
        "model_sha256": run.model_sha256,
        "photos": photo_names(run, lambda photo: [photo.sha256, *photo.captions]),
        "priors": sorted(
            _prior(image, subject) for subject in run.subjects for image in subject.class_images
        ),
    }


def _prior(image: Photo, subject: Subject) -> str:
    """A class image, with its captions where they are its own."""
    own = [caption for caption in image.captions if caption != subject.class_prompt]
    return " ".join([image.sha256, *(image.captions if own else ())])


def photo_names(run: ResolvedRun, fact: Callable[[Photo], T]) -> dict[str, T]:
    """A fact of every photograph by its name; those of concepts have their number before it."""
    named = {photo.name: fact(photo) for photo in run.photos}
    for number, subject in enumerate(run.more, 2):
        named |= {f"concept {number}: {photo.name}": fact(photo) for photo in subject.photos}
    return named


def enter(uri: str, run: dict[str, Any], without: tuple[str, ...] = ()) -> None:
    """Begin a run, or go on with it, perhaps to more steps; one that made nothing begins anew.

    `without` is that of `compare`. Raises BadInput, with the difference, when the folder holds
    another run.
    """
    if storage.create_bytes(storage.join(uri, FILE), _encoded(run)):
        return
    there = _read(uri)
    if has_made_nothing(uri):
        changed = run
    else:
        _compare(uri, there, run, without)
        changed = {**there, "train": {**there["train"], "steps": run["train"]["steps"]}}
    if changed != there:
        storage.write_bytes(storage.join(uri, FILE), _encoded(changed))


def compare(uri: str, run: dict[str, Any], without: tuple[str, ...] = ()) -> None:
    """Raise BadInput, with the difference, when the folder holds another run that made something.

    More steps are no difference where the learning rate does not depend on their number. Facts
    named in `without` are passed over: those that are not known before there is work.
    """
    if storage.exists(storage.join(uri, FILE)) and not has_made_nothing(uri):
        _compare(uri, _read(uri), run, without)


def check_own(uri: str, run: dict[str, Any]) -> None:
    """Raise BadInput when the folder's lock is another run's by now."""
    if storage.exists(storage.join(uri, FILE)):
        _compare(uri, _read(uri), run)


def num_steps(uri: str) -> int:
    """The optimizer steps that the run in this folder is to have."""
    steps: int = _read(uri)["train"]["steps"]
    return steps


def name(uri: str) -> str:
    """The name of the run in this folder."""
    return str(_read(uri)["run"]["name"])


def has_made_nothing(uri: str) -> bool:
    """Whether a run was begun in this folder of which nothing is kept yet."""
    return not storage.exists(storage.join(uri, "export", exports.FILE)) and not any(
        name.endswith(".json") for name in storage.list_files(storage.join(uri, "checkpoints"))
    )


def _compare(
    uri: str, there: dict[str, Any], run: dict[str, Any], without: tuple[str, ...] = ()
) -> None:
    if _is_extended(there, run):
        run = {**run, "train": {**run["train"], "steps": there["train"]["steps"]}}
    known = _without_new_keys(run, there, _defaults())
    before, after = ({k: v for k, v in x.items() if k not in without} for x in (there, known))
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


def _is_extended(there: dict[str, Any], run: dict[str, Any]) -> bool:
    before, now = there["train"]["steps"], run["train"]["steps"]
    return now > before and run["train"]["schedule"] in STEPLESS_SCHEDULES


def _without_new_keys(run: Any, there: Any, defaults: Any) -> Any:
    """The run without keys that the lock's version did not have, where they are not set."""
    if not all(isinstance(each, dict) for each in (run, there, defaults)):
        return run
    return {
        name: _without_new_keys(value, there.get(name), defaults.get(name))
        for name, value in run.items()
        if name in there or name not in defaults or defaults[name] != value
    }


def _defaults() -> dict[str, Any]:
    """Every key's default; keys without one are left out."""
    values = DreamBoothConfig.model_construct().model_dump(mode="json")
    for name, field in DreamBoothConfig.model_fields.items():
        section: Any = field.annotation
        if field.is_required():
            values[name] = section.model_construct().model_dump(mode="json")
    return values


def _read(uri: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(storage.read_bytes(storage.join(uri, FILE)))
    return values


def _encoded(run: dict[str, Any]) -> bytes:
    return json.dumps(run, indent=1, ensure_ascii=False).encode()
