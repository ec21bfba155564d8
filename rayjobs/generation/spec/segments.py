"""Segments of a data set: a draft becomes the first one, is found again, or is appended.

Owns the decision, and which part of an extended job is new. Knows nothing of how records are made.
"""

from collections.abc import Callable
from typing import Any

from rayjobs import storage
from rayjobs.config import BadInput
from rayjobs.dataset.lock import (
    Lock,
    Segment,
    create_lock,
    find,
    lock_uri,
    names_uri,
    read_lock,
    replace_lock,
    snapshot_uri,
)
from rayjobs.generation.prompts.snapshot import Names, Snapshot
from rayjobs.generation.spec.draft import Draft
from rayjobs.generation.spec.lock import config_of
from rayjobs.generation.spec.records import Spec

SEEDS = ("job.seeds.count", "job.seeds.values", "job.seeds.derive")
PROMPTS = ("prompts_sha256", "num_prompts", "job.prompts.inline")


def enter(draft: Draft, determinism: Callable[[], dict[str, Any]], extend: bool = False) -> Lock:
    """The data set's lock with the draft's job in it.

    `determinism()` is asked for the class of a new data set. Raises BadInput with the difference
    when there is another job and it is not to be extended.
    """
    uri = draft.config.output.uri
    mark = storage.etag(lock_uri(uri))
    lock = read_lock(uri)
    if lock is None:
        lock = Lock(segments=(draft.segment,), determinism=determinism())
        if not create_lock(lock, uri):
            return enter(draft, determinism, extend)
    else:
        number = _find(lock, draft, extend)
        if number is None:
            lock = lock.model_copy(update={"segments": (*lock.segments, _new_part(lock, draft))})
            if not replace_lock(lock, mark or "", uri):
                raise BadInput(f"{lock_uri(uri)} was changed by another run meanwhile; start again")
    _keep_snapshots(lock, draft)
    return lock


def _find(lock: Lock, draft: Draft, extend: bool) -> int | None:
    try:
        return find(lock, draft.segment, draft.config.output.uri)
    except BadInput:
        if not extend:
            raise
        return None


def _keep_snapshots(lock: Lock, draft: Draft) -> None:
    """Store the draft's snapshots unless they are there; nor are they when a run ended before."""
    uri = draft.config.output.uri
    number = find(lock, draft.segment, uri)
    if not storage.exists(snapshot_uri(uri, number)):
        storage.put_file(snapshot_uri(uri, number), draft.prompts)
    if draft.names is not None and not storage.exists(names_uri(uri, number)):
        storage.put_file(names_uri(uri, number), draft.names)


def _new_part(lock: Lock, draft: Draft) -> Segment:
    """The draft as a segment behind the others, without what the last one's job has already."""
    last, segment = lock.segments[-1], draft.segment
    if last.job["output"] != segment.job["output"]:
        raise BadInput("--extend cannot change output.*: all shards of a data set are of one kind")
    before, after = last.identity(), segment.identity()
    changed = {k for k in before.keys() | after.keys() if before.get(k) != after.get(k)}
    first_prompt = first_seed = 0
    if changed <= set(SEEDS):
        first_seed = _more_seeds(last, draft)
    elif changed <= {*PROMPTS, *SEEDS} and _begins_alike(last, lock, draft):
        if changed & set(SEEDS):
            raise BadInput("--extend takes more prompts or more seeds, not both; do one, then both")
        first_prompt = last.num_prompts
    names = () if draft.names is None else Names(str(draft.names))
    spec = Spec(draft.config, Snapshot(str(draft.prompts)), names, first_prompt, first_seed)
    return segment.model_copy(
        update={
            "first_prompt": first_prompt,
            "first_seed": first_seed,
            "first_record": last.first_record + last.num_records,
            "num_records": spec.num_records,
            "first_shard": last.shards.stop,
            "num_shards": spec.num_shards,
        }
    )


def _more_seeds(last: Segment, draft: Draft) -> int:
    old, new = config_of(last, "-").seeds, draft.config.seeds
    same_way = (old.derive is None) == (new.derive is None)
    if not same_way or new.num <= old.num or new.values[: len(old.values)] != old.values:
        raise BadInput(
            f"--extend cannot turn seeds {old.model_dump(exclude_defaults=True)} into "
            f"{new.model_dump(exclude_defaults=True)}: the new ones must begin with the old ones"
        )
    return old.num


def _begins_alike(last: Segment, lock: Lock, draft: Draft) -> bool:
    """Whether the draft's prompts are those of the last segment and some more."""
    uri = snapshot_uri(draft.config.output.uri, len(lock.segments) - 1)
    old, new = Snapshot(uri), Snapshot(str(draft.prompts))
    if len(new) <= len(old) or old.columns != new.columns:
        return False
    return all(old.row(n) == new.row(n) for n in range(len(old)))
