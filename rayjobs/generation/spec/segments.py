"""A draft becomes a segment of a data set: found in the lock, created there or appended.

Owns which part of an extended job is new, and the snapshots beside the lock. Knows nothing of Ray
or of how records are made.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from rayjobs import storage
from rayjobs.config import BadInput
from rayjobs.dataset.inspection import inspect_snapshots
from rayjobs.dataset.lock import (
    Lock,
    Segment,
    create_lock,
    find_segment,
    lock_uri,
    names_uri,
    read_lock,
    replace_lock,
    snapshot_uri,
)
from rayjobs.dataset.manifest import Manifest
from rayjobs.dataset.records import OPTIONAL, SCORES, SYNTAX, pictures
from rayjobs.diffusion import weights
from rayjobs.generation.config import GenerateConfig
from rayjobs.generation.prompts.snapshot import (
    Snapshot,
    write_like,
)
from rayjobs.generation.spec.draft import JobDraft, open_draft
from rayjobs.generation.spec.lock import (
    config_of,
    data_set_schema,
    passed_through,
    record_schema,
)

SEED_KEYS = {"job.seeds.count", "job.seeds.values", "job.seeds.derive"}
PROMPT_KEYS = {"prompts_sha256", "num_prompts", "job.prompts.inline"}
"""What `--extend` may change of a job for its records to go on; with other keys all are new."""


def ensure_segment(
    draft: JobDraft, determinism: Callable[[], dict[str, Any]], extend: bool = False
) -> Lock:
    """The data set's lock with the draft's job in it: it was there, or is created or appended.

    A job of which nothing was made yet gives way to another, and to other workers. `determinism()`
    gives the class of a new data set. Raises BadInput with the difference when there is another job
    and it is not to be extended.
    """
    uri = draft.config.output.uri
    mark = storage.etag(lock_uri(uri))
    before = read_lock(uri)
    untouched = Manifest(uri).is_untouched()
    if before is None and not untouched:
        raise BadInput(
            f"{uri} holds shards, but {lock_uri(uri)}, which says of which job, is gone; put it "
            "back, or choose another output.uri"
        )
    mine = determinism() if untouched else {}
    if before is None or (untouched and not _is_there(before, draft, mine)):
        _check_twins(draft.config)
        storage.remove_folder(storage.join(uri, "prompts"))
        lock = Lock(segments=(draft.segment,), determinism=mine)
        stored = replace_lock(lock, mark, uri) if mark else create_lock(lock, uri)
        if not stored:
            return ensure_segment(draft, determinism, extend)
    else:
        lock = before
        draft, number = _find_segment(lock, draft, extend)
        if number is None:
            _check_twins(draft.config)
            lock = lock.model_copy(update={"segments": (*lock.segments, _new_part(lock, draft))})
            if not replace_lock(lock, mark or "", uri):
                raise BadInput(f"{lock_uri(uri)} was changed by another run meanwhile; start again")
    _keep_snapshots(lock, draft)
    return lock


def _check_twins(config: GenerateConfig) -> None:
    """Refuse what would make an image twice; not in jobs that were begun before this was asked."""
    for key in ("inline", "templates"):
        texts = getattr(config.prompts, key)
        twin = next((text for text in texts if texts.count(text) > 1), None)
        if twin is not None:
            raise BadInput(
                f"prompts.{key} has {twin!r:.80} twice, which would make an image twice; remove one"
            )


def _is_there(lock: Lock, draft: JobDraft, determinism: dict[str, Any]) -> bool:
    mine = draft.segment.identity()
    is_one = any(segment.identity() == mine for segment in lock.segments)
    return is_one and lock.determinism == determinism


def _find_segment(lock: Lock, draft: JobDraft, extend: bool) -> tuple[JobDraft, int | None]:
    """The draft's segment, if it is there, and the draft with the columns that it has there."""
    uri = draft.config.output.uri
    with suppress(BadInput):
        return draft, find_segment(lock, draft.segment, uri)
    try:
        alike = _with_columns_of(lock, draft)
        return alike, find_segment(lock, alike.segment, uri)
    except (BadInput, storage.NotThere):
        if not extend:
            find_segment(lock, draft.segment, uri)  # tells the difference
    return _with_columns_of(lock, draft), None


def _with_columns_of(lock: Lock, draft: JobDraft) -> JobDraft:
    """The draft with the columns that records of the data set have: one schema for all shards."""
    wanted = passed_through(data_set_schema(draft.config.output.uri, lock), lock)
    path = draft.prompts.with_name("like.parquet")
    write_like(wanted, str(draft.prompts), str(path))
    segment = draft.segment.model_copy(update={"prompts_sha256": weights.sha256_of(path)})
    return replace(draft, segment=segment, prompts=path)


def _check_optional(lock: Lock, draft: JobDraft) -> None:
    """Refuse a draft whose records do not have the same optional columns as the data set's."""
    whole = data_set_schema(draft.config.output.uri, lock)
    mine = record_schema(draft.config, Snapshot(str(draft.prompts)))
    stored = {*pictures(whole), *pictures(mine)}
    for name in (*OPTIONAL, *sorted(stored)):
        if (name in whole.names) != (name in mine.names):
            how = "give" if name in whole.names else "leave out"
            keys = {SYNTAX.name: "prompts.syntax", "control_images": "controls"}
            keys |= dict.fromkeys(stored, "that one of controls")
            keys["ip_adapter_images"] = "ip_adapters"
            key = keys.get(name, f"sampler.{name}")
            raise BadInput(
                f"--extend cannot change whether records have a {name}: {how} {key}, or choose "
                "another output.uri"
            )


def _keep_snapshots(lock: Lock, draft: JobDraft) -> None:
    """Store the draft's snapshots unless they are there: an earlier run may have been killed."""
    uri = draft.config.output.uri
    number = find_segment(lock, draft.segment, uri)
    if not storage.exists(snapshot_uri(uri, number)):
        storage.put_file(snapshot_uri(uri, number), draft.prompts)
    if draft.names is not None and not storage.exists(names_uri(uri, number)):
        storage.put_file(names_uri(uri, number), draft.names)


def restore_snapshots(uri: str, lock: Lock, current: GenerateConfig) -> None:
    """Write snapshots that are gone or replaced again, from what they were made of.

    Raises BadInput or StorageError when that is not what it was.
    """
    for number in sorted({fault.segment or 0 for fault in inspect_snapshots(uri, lock)}):
        wanted = lock.segments[number]
        with open_draft(config_of(wanted, uri, current), confirmed=True) as draft:
            if number and draft.segment.prompts_sha256 != wanted.prompts_sha256:
                before = lock.model_copy(update={"segments": lock.segments[:number]})
                draft = _with_columns_of(before, draft)
            for key, source in (("prompts_sha256", "prompts"), ("init_sha256", "init")):
                if getattr(draft.segment, key) != getattr(wanted, key):
                    raise BadInput(
                        f"prompts/segment-{number:03d} cannot be made again: {source}.uri, "
                        f"{getattr(draft.config, source).uri}, is not what it was"
                    )
            storage.put_file(snapshot_uri(uri, number), draft.prompts)
            if draft.names is not None:
                storage.put_file(names_uri(uri, number), draft.names)


def _new_part(lock: Lock, draft: JobDraft) -> Segment:
    """The draft as a segment behind the others, without what the last one's job has already."""
    last, segment = lock.segments[-1], draft.segment
    if last.job["output"] != segment.job["output"]:
        raise BadInput("--extend cannot change output.*: all shards of a data set are of one kind")
    for score in SCORES:
        old, new = (not each.job["quality"].get(score) for each in (last, segment))
        if old != new:
            raise BadInput(
                f"--extend cannot change whether records have a {SCORES[score][0]}: "
                f"{'leave' if old else 'give'} quality.{score}{' out' if old else ''}, or choose "
                "another output.uri"
            )
    _check_optional(lock, draft)
    before, after = last.identity(), segment.identity()
    changed = {k for k in before.keys() | after.keys() if before.get(k) != after.get(k)}
    first_prompt = first_seed = 0
    if changed <= SEED_KEYS:
        first_seed = _check_more_seeds(last, draft)
    elif changed <= PROMPT_KEYS | SEED_KEYS and _has_more_prompts(lock, draft):
        if changed & SEED_KEYS:
            raise BadInput("--extend takes more prompts or more seeds, not both; do one, then both")
        first_prompt = last.num_prompts
    spec = draft.spec(first_prompt, first_seed)
    return segment.model_copy(
        update={
            "first_prompt": first_prompt,
            "first_seed": first_seed,
            "first_record": last.records.stop,
            "num_records": spec.num_records,
            "first_shard": last.shards.stop,
            "num_shards": spec.num_shards,
        }
    )


def _check_more_seeds(last: Segment, draft: JobDraft) -> int:
    """The number of seeds in the last segment, with which the draft's begin."""
    old, new = config_of(last, "-").seeds, draft.config.seeds
    same_way = (old.derive is None) == (new.derive is None)
    if not same_way or new.num <= old.num or new.values[: len(old.values)] != old.values:
        raise BadInput(
            f"--extend cannot turn seeds {old.model_dump(exclude_defaults=True)} into "
            f"{new.model_dump(exclude_defaults=True)}: the new ones must begin with the old ones"
        )
    return old.num


def _has_more_prompts(lock: Lock, draft: JobDraft) -> bool:
    """Whether the draft's prompts are those of the last segment and some more."""
    uri = snapshot_uri(draft.config.output.uri, len(lock.segments) - 1)
    old, new = Snapshot(uri), Snapshot(str(draft.prompts))
    if len(new) <= len(old) or old.columns != new.columns:
        return False
    return all(old.row(n) == new.row(n) for n in range(len(old)))
