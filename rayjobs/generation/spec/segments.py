"""A job becomes a segment of a data set: checked and resolved as a draft, then put into the lock.

Owns the checks that need no worker, what a job's segment in the lock says, and which part of an
extended job is new. Knows nothing of Ray or of how records are made.
"""

import hashlib
import sys
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from rayjobs import storage
from rayjobs.config import BadInput
from rayjobs.dataset.formats import check_schema
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
from rayjobs.dataset.records import SCORES, SYNTAX, canonical_json
from rayjobs.diffusion import weights
from rayjobs.diffusion.adapters import notes
from rayjobs.diffusion.facts import Usual, adapter_usual, file_name
from rayjobs.diffusion.files.header import read_header
from rayjobs.diffusion.request import check_strength
from rayjobs.generation.config import GenerateConfig
from rayjobs.generation.prompts.snapshot import (
    ImageNames,
    Snapshot,
    check_numbers,
    list_pictures,
    write_like,
    write_names,
    write_snapshot,
)
from rayjobs.generation.resolved import ResolvedConfig, model_name
from rayjobs.generation.spec.lock import (
    config_of,
    data_set_schema,
    job_part,
    passed_through,
    record_schema,
)
from rayjobs.generation.spec.records import Spec
from rayjobs.models import exports
from rayjobs.models.facts import find_weights

T = TypeVar("T")
SEED_KEYS = {"job.seeds.count", "job.seeds.values", "job.seeds.derive"}
PROMPT_KEYS = {"prompts_sha256", "num_prompts", "job.prompts.inline"}
"""What `--extend` may change of a job for its records to go on; with other keys all are new."""


@dataclass(frozen=True)
class JobDraft:
    """A resolved job, its segment as if it stood alone, and local snapshots of what it reads."""

    config: ResolvedConfig
    segment: Segment
    prompts: Path
    names: Path | None
    """Of init images, where there are any."""

    def spec(self, first_prompt: int = 0, first_seed: int = 0) -> Spec:
        names = () if self.names is None else ImageNames(str(self.names))
        return Spec(self.config, Snapshot(str(self.prompts)), names, first_prompt, first_seed)


@contextmanager
def open_draft(config: ResolvedConfig, confirmed: bool = False) -> Generator[JobDraft]:
    """Check a job and write its snapshots, which are gone afterwards; `confirmed` is of any size.

    Raises BadInput or StorageError naming the key that is to be changed.
    """
    storage.check(config.output.uri, write=True)
    loras = [lora.uri for lora in config.model.loras]
    scorers = [getattr(config.quality, name) for name in SCORES]
    for uri in (config.prompts.uri, config.init.uri, config.model.uri, *loras, *scorers):
        if uri is not None and storage.is_remote(uri):
            storage.check(uri)
    model = _check_model(config)
    loras_sha256, usual = _check_loras(config, model)
    config = _with_usual(config, usual)
    _warn_of_use(config, usual)
    scorers_sha256 = _hash_scorers(config)
    with tempfile.TemporaryDirectory() as folder:
        prompts, names = Path(folder) / "prompts.parquet", Path(folder) / "names.parquet"
        num_prompts = write_snapshot(config.prompts, str(prompts), model.family)
        if config.init.uri is not None:
            write_names(list_pictures(config.init.uri), str(names))
        rows = Snapshot(str(prompts))
        _check_sampler_column(config, rows, model)
        spec = Spec(config, rows, ImageNames(str(names)) if names.exists() else ())
        if not confirmed:
            _check_size(config, spec.num_records)
        check_schema(config.output.format, record_schema(config, rows))
        if config.output.format != "parquet":
            check_numbers(str(prompts))
        segment = Segment(
            job=job_part(config),
            prompts_sha256=weights.sha256_of(prompts),
            num_prompts=num_prompts,
            init_sha256=weights.sha256_of(names) if names.exists() else None,
            model_name=model_name(config.model.uri),
            model_sha256=_named(
                "model.words", lambda: exports.identity(model.sha256, config.model.words)
            ),
            loras_sha256=loras_sha256,
            scorers_sha256=scorers_sha256,
            guided=_is_guided(config, rows),
            num_records=spec.num_records,
            num_shards=spec.num_shards,
        )
        yield JobDraft(config, segment, prompts, names if names.exists() else None)


def ensure_segment(
    draft: JobDraft, determinism: Callable[[], dict[str, Any]], extend: bool = False
) -> Lock:
    """The data set's lock with the draft's job in it: it was there, or is created or appended.

    A job of which nothing was made yet gives way to another. `determinism()` gives the class of a
    new data set. Raises BadInput with the difference when there is another job and it is not to be
    extended.
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
    if before is None or (untouched and not _is_there(before, draft)):
        _check_twins(draft.config)
        storage.remove_folder(storage.join(uri, "prompts"))
        lock = Lock(segments=(draft.segment,), determinism=determinism())
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


def _is_there(lock: Lock, draft: JobDraft) -> bool:
    return any(segment.identity() == draft.segment.identity() for segment in lock.segments)


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
    wanted = passed_through(data_set_schema(draft.config.output.uri, lock))
    path = draft.prompts.with_name("like.parquet")
    write_like(wanted, str(draft.prompts), str(path))
    segment = draft.segment.model_copy(update={"prompts_sha256": weights.sha256_of(path)})
    return replace(draft, segment=segment, prompts=path)


def _names_syntax(lock: Lock, draft: JobDraft) -> tuple[bool, bool]:
    """Whether the data set's records, and the draft's, say in which syntax their prompts are."""
    whole = data_set_schema(draft.config.output.uri, lock)
    mine = record_schema(draft.config, Snapshot(str(draft.prompts)))
    return SYNTAX.name in whole.names, SYNTAX.name in mine.names


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
        old, new = (each.job["quality"].get(score) is None for each in (last, segment))
        if old != new:
            raise BadInput(
                f"--extend cannot change whether records have a {SCORES[score][0]}: "
                f"{'leave' if old else 'give'} quality.{score}{' out' if old else ''}, or choose "
                "another output.uri"
            )
    old, new = _names_syntax(lock, draft)
    if old != new:
        raise BadInput(
            "--extend cannot change whether records have a prompt_syntax: "
            f"{'give' if old else 'leave out'} prompts.syntax, or choose another output.uri"
        )
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


def _check_size(config: GenerateConfig, num_records: int) -> None:
    limit = config.output.most_images
    if num_records > limit:
        raise BadInput(
            f"the job has {num_records:,} images, more than output.most_images, {limit:,}; "
            f"look at it with `plan`, then set output.most_images={num_records} to confirm"
        )


def _is_guided(config: GenerateConfig, rows: Snapshot) -> bool:
    """Whether any record may use guidance."""
    if "guidance_scale" in rows.columns:
        return True
    scales = config.parameters.guidance_scale or (config.sampler.guidance_scale,)
    return any(scale is None or scale > 1 for scale in scales)


def _check_model(config: GenerateConfig) -> weights.Weights:
    model = find_weights(config.model)
    from rayjobs.diffusion.sampler import resolve

    own = config.sampler.name or model.scheduler_name
    axis = config.parameters.sampler
    for key, name in [("parameters.sampler", n) for n in axis] or [("sampler", own)]:
        _named(key, lambda name=name: resolve(name, config.sampler.options, model.prediction))
    if model.single is not None:
        _named("model.config", model.load_config_folder)
    return model


def _check_sampler_column(config: GenerateConfig, rows: Snapshot, model: weights.Weights) -> None:
    if "sampler" not in rows.columns:
        return
    from rayjobs.diffusion.sampler import resolve

    for name in filter(None, rows.distinct("sampler")):
        check = partial(resolve, name, config.sampler.options, model.prediction)
        _named(f"prompts.uri: column sampler of {config.prompts.uri}", check)


def _check_loras(config: GenerateConfig, model: weights.Weights) -> tuple[tuple[str, ...], Usual]:
    """Hash and scale of each adapter, and the steps and guidance to use with them.

    Raises BadInput for an adapter that does not fit the model.
    """
    if not config.model.loras:
        return (), model.usual
    from rayjobs.diffusion.adapters import fit

    paths = [storage.fetch(lora.uri) for lora in config.model.loras]
    _named("model.loras", lambda: fit.check(paths, model))
    said, known = [], []
    for lora, path in zip(config.model.loras, paths, strict=True):
        file = weights.lora_file(path)
        said.append(f"{notes.file_sha256(file)} x {lora.scale:g}")
        title = notes.title_of(read_header(file).metadata)
        known.append(adapter_usual(f"{file_name(lora.uri)} {title}"))
    return tuple(said), next(filter(None, known), model.usual)


def _with_usual(config: ResolvedConfig, usual: Usual) -> ResolvedConfig:
    """The job with the steps that the model is made for, where it gives none.

    A distilled model's guidance is written down too: it was another one before they were known.
    """
    sampler = config.sampler
    steps = usual.steps if sampler.steps is None else sampler.steps
    guidance = sampler.guidance_scale
    if usual.kind is not None and None in (sampler.steps, guidance):
        made_for = f"{usual.steps} steps and guidance {usual.guidance_scale:g}"
        print(f"a {usual.kind} model: {made_for} where the job gives none", file=sys.stderr)
        guidance = usual.guidance_scale if guidance is None else guidance
    if config.init.uri is not None and not config.parameters.steps:
        weakest = min(config.parameters.strength or (config.init.strength,))
        _named("init.strength", lambda: check_strength(weakest, steps))
    given = {"steps": steps, "guidance_scale": guidance}
    return config.model_copy(update={"sampler": sampler.model_copy(update=given)})


def _warn_of_use(config: ResolvedConfig, usual: Usual) -> None:
    """Print what a distilled model, or one that an adapter makes one, is not made for."""
    guidance = config.sampler.guidance_scale
    guidance = usual.guidance_scale if guidance is None else guidance
    warning = usual.warning(config.sampler.steps or usual.steps, guidance)
    if warning is not None:
        print(f"warning: sampler: {warning}", file=sys.stderr)


def _hash_scorers(config: GenerateConfig) -> dict[str, str]:
    """Hash of each scoring model that is a file or a folder; a hub id stands for itself."""
    digests = {}
    for name in SCORES:
        uri = getattr(config.quality, name)
        if uri is None:
            continue
        path = Path(storage.to_local(uri))
        if not path.exists() and (path.is_absolute() or uri.startswith(".")):
            raise BadInput(f"quality.{name}: {uri} does not exist")
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        hashes = [(p.name, weights.sha256_of(p)) for p in files if p.is_file()]
        digests[name] = hashlib.sha256(canonical_json(hashes or uri)).hexdigest()
    return digests


def _named(key: str, check: Callable[[], T]) -> T:
    """The check's result; an error names the key that is to be changed."""
    try:
        return check()
    except (BadInput, storage.StorageError):
        raise
    except (ValueError, ImportError) as error:
        raise BadInput(f"{key}: {error}") from None
