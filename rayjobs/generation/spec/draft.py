"""A job before it is begun: everything checked and resolved, nothing written yet.

Owns the checks that need no worker, and what a job's segment in the lock says. Knows nothing of
Ray, and of a data set only whether it can be written.
"""

import hashlib
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from rayjobs import storage
from rayjobs.config import BadInput
from rayjobs.dataset.formats import check_schema
from rayjobs.dataset.lock import Segment
from rayjobs.dataset.records import SCORES, canonical_json
from rayjobs.diffusion import weights
from rayjobs.generation.config import GenerateConfig
from rayjobs.generation.prompts.snapshot import (
    Names,
    Snapshot,
    list_pictures,
    write_names,
    write_snapshot,
)
from rayjobs.generation.spec.lock import job_part, record_schema
from rayjobs.generation.spec.records import Spec
from rayjobs.models import exports
from rayjobs.models.facts import find_weights

T = TypeVar("T")


@dataclass(frozen=True)
class Draft:
    """A job's segment as if it stood alone, with local snapshots of what it reads."""

    config: GenerateConfig
    segment: Segment
    prompts: Path
    names: Path | None


@contextmanager
def check(config: GenerateConfig, confirmed: bool = False) -> Generator[Draft]:
    """Check and resolve a job; the snapshots are gone afterwards.

    `confirmed` jobs may be of any size.
    Raises BadInput or StorageError naming the key that is to be changed.
    """
    storage.check(config.output.uri, write=True)
    config = config.model_copy(update={"model": exports.resolve(config.model)})
    loras = [lora.uri for lora in config.model.loras]
    scorers = [getattr(config.quality, name) for name in SCORES]
    for uri in (config.prompts.uri, config.init.uri, config.model.uri, *loras, *scorers):
        if uri is not None and storage.is_remote(uri):
            storage.check(uri)
    model = _check_model(config)
    loras_sha256, scorers_sha256 = _hash_loras(config), _hash_scorers(config)
    with tempfile.TemporaryDirectory() as folder:
        prompts, names = Path(folder) / "prompts.parquet", Path(folder) / "names.parquet"
        num_prompts = write_snapshot(config.prompts, str(prompts))
        if config.init.uri is not None:
            write_names(list_pictures(config.init.uri), str(names))
        rows = Snapshot(str(prompts))
        spec = Spec(config, rows, Names(str(names)) if names.exists() else ())
        if not confirmed:
            _check_size(config, spec.num_records)
        check_schema(config.output.format, record_schema(config, rows))
        segment = Segment(
            job=job_part(config),
            prompts_sha256=weights.sha256_of(prompts),
            num_prompts=num_prompts,
            init_sha256=weights.sha256_of(names) if names.exists() else None,
            model_name=_model_name(config.model.uri),
            model_sha256=named(
                "model.words", lambda: exports.identity(model.sha256, config.model.words)
            ),
            loras_sha256=loras_sha256,
            scorers_sha256=scorers_sha256,
            guided=_is_guided(config, rows),
            num_records=spec.num_records,
            num_shards=spec.num_shards,
        )
        yield Draft(config, segment, prompts, names if names.exists() else None)


def _check_size(config: GenerateConfig, num_records: int) -> None:
    most = config.output.most_images
    if num_records > most:
        raise BadInput(
            f"the job has {num_records:,} images, more than output.most_images, {most:,}; "
            f"look at it with `plan`, then set output.most_images={num_records} to confirm"
        )


def _is_guided(config: GenerateConfig, rows: Snapshot) -> bool:
    """Whether any record may use guidance."""
    if "guidance_scale" in rows.columns:
        return True
    scales = config.parameters.guidance_scale or (config.sampler.guidance_scale,)
    return any(scale is None or scale > 1 for scale in scales)


def _model_name(uri: str) -> str:
    """The model's name in records, the same wherever a local copy of it lies."""
    return Path(uri).name if Path(uri).exists() else uri


def _check_model(config: GenerateConfig) -> weights.Weights:
    model = find_weights(config.model.uri)
    from rayjobs.diffusion.sampler import resolve

    own = config.sampler.name or model.scheduler_name
    axis = config.parameters.sampler
    for key, name in [("parameters.sampler", n) for n in axis] or [("sampler", own)]:
        named(key, lambda name=name: resolve(name, config.sampler.options, model.is_edm))
    return model


def _hash_loras(config: GenerateConfig) -> tuple[str, ...]:
    """Hash and scale of each adapter."""
    from rayjobs.diffusion.lora import weight_file

    found = []
    for lora in config.model.loras:
        file = named("model.loras", lambda uri=lora.uri: weight_file(storage.fetch(uri)))
        found.append(f"{weights.sha256_of(Path(file))} x {lora.scale:g}")
    return tuple(found)


def _hash_scorers(config: GenerateConfig) -> dict[str, str]:
    """Hash of each scoring model that is a file or a folder; a hub id stands for itself."""
    found = {}
    for name in SCORES:
        uri = getattr(config.quality, name)
        if uri is None:
            continue
        path = Path(storage.to_local(uri))
        if not path.exists() and (path.is_absolute() or uri.startswith(".")):
            raise BadInput(f"quality.{name}: {uri} does not exist")
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        hashes = [(p.name, weights.sha256_of(p)) for p in files if p.is_file()]
        found[name] = hashlib.sha256(canonical_json(hashes or uri)).hexdigest()
    return found


def named(key: str, check: Callable[[], T]) -> T:
    """The check's result; what it refuses is told with the key that is to be changed."""
    try:
        return check()
    except (BadInput, storage.StorageError):
        raise
    except (ValueError, ImportError) as error:
        raise BadInput(f"{key}: {error}") from None
