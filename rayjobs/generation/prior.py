"""Class images for DreamBooth: the generation job, repeated until all prompts have their number.

Owns how many of each prompt are wanted, which pictures are refused, and the seeds that replace
them. How records are made, stored and resumed is the job's.
"""

import io
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from pydantic import Field

from rayjobs import storage
from rayjobs.config import BadInput, Config, JobFailed, differences
from rayjobs.dataset.lock import Lock, read_lock, snapshot_uri
from rayjobs.dataset.manifest import Manifest
from rayjobs.dataset.records import SYNTAX, canonical_json
from rayjobs.generation import job
from rayjobs.generation.config import (
    EngineConfig,
    GenerateConfig,
    ImageConfig,
    ModelConfig,
    OutputConfig,
    PromptsConfig,
    SamplerConfig,
    WorkersConfig,
)
from rayjobs.generation.prompts.snapshot import Snapshot, write_snapshot
from rayjobs.generation.spec.lock import job_part
from rayjobs.generation.spec.records import Spec, derived_seed
from rayjobs.models.facts import find_weights
from rayjobs.quality import duplicates, pixels

MAX_ROUNDS = 12
COLUMNS = ("record", "prompt", "seed", "status", "error", "image")
Key = tuple[str, int]
"""A prompt and a seed: which picture it is, when all else is the same."""


class PriorConfig(Config):
    """The keys of a prior job: those of `generate`, and how many images of each prompt."""

    model: ModelConfig
    prompts: PromptsConfig
    """Class prompts, or templates with class synonyms as axes."""
    num_images: int = Field(default=100, ge=1)
    """Good images of each prompt."""
    job_seed: int = 0
    """What the seeds are derived from."""
    sampler: SamplerConfig = SamplerConfig()
    image: ImageConfig = ImageConfig()
    output: OutputConfig
    engine: EngineConfig = EngineConfig()
    workers: WorkersConfig = WorkersConfig()


@dataclass(frozen=True)
class Summary:
    """What a run made, refused and has now; `diversity` is as `duplicates.diversity` has it."""

    num_images: int
    num_made: int
    refused: dict[str, int]
    diversity: float
    seconds: float
    output_uri: str


@dataclass
class ClassImage:
    """A class image that was made; `fault` says why it is refused."""

    record: int
    key: Key
    fault: str | None
    signature: pixels.Signature | None


def run(config: PriorConfig) -> Summary:
    """Make class images until every prompt has its number of good ones.

    A blank or failed picture, or one too like an earlier one, is replaced by that of the next seed
    derived for its prompt. Raises BadInput when the place holds other images, JobFailed when the
    prompts do not give enough different pictures.
    """
    started, uri = time.monotonic(), config.output.uri
    storage.check(uri, write=True)
    prompts = list(_prompts(config))
    _check_same_settings(config)
    refused, reasons, made = _read_refused(uri), Counter[str](), 0
    for _ in range(MAX_ROUNDS):
        images = list(_judge_all(uri))
        bad = [image for image in images if image.fault is not None]
        reasons.update(str(image.fault) for image in bad)
        refused |= {image.key for image in bad}
        _write_refused(uri, refused)
        seeds = _Seeds(config.job_seed, refused | {image.key for image in images})
        if bad:
            made += _replace(config, bad, seeds)
            continue
        rows = _missing(config, prompts, images, seeds)
        if not rows:
            break
        made += _make(config, rows)
    else:
        raise JobFailed(
            f"after {MAX_ROUNDS} rounds some images still are refused ({_describe(reasons)}); "
            "give more varied prompts or class synonyms, or another sampler"
        )
    signatures = duplicates.pack(image.signature for image in images if image.signature)
    diversity = duplicates.diversity(signatures)
    seconds = time.monotonic() - started
    return Summary(len(images), made, dict(reasons), diversity, seconds, uri)


def describe(config: PriorConfig) -> str:
    """How many class images a configuration asks for. Raises BadInput as `run` does."""
    find_weights(config.model)
    prompts = len(list(_prompts(config)))
    whole = prompts * config.num_images
    return f"{whole:,} class images: {prompts:,} prompts x {config.num_images:,} good ones"


class _Seeds:
    """Hands out derived seeds that were neither used nor refused for their prompt."""

    def __init__(self, job_seed: int, used: set[Key]):
        self._job_seed = job_seed
        self._used = used
        self._index: Counter[str] = Counter()

    def next(self, prompt: str) -> int:
        while True:
            seed = derived_seed(self._job_seed, prompt, self._index[prompt])
            self._index[prompt] += 1
            if (prompt, seed) not in self._used:
                self._used.add((prompt, seed))
                return seed


def _prompts(config: PriorConfig) -> Iterator[str]:
    """Every class prompt, each once."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "prompts.parquet")
        write_snapshot(config.prompts, path)
        rows = Snapshot(path)
        if SYNTAX.name in rows.columns:
            raise BadInput(
                f"prompts.uri: {config.prompts.uri} has settings for each prompt, but class images "
                "share theirs; give a file of prompts alone, and prompts.syntax"
            )
        spec = Spec(_job(config, config.prompts), rows)
        yield from dict.fromkeys(spec.record(k).prompt for k in range(spec.num_records))


def _job(config: PriorConfig, prompts: PromptsConfig) -> GenerateConfig:
    """The generation job that makes images of `prompts`, one each."""
    shared = ("model", "sampler", "image", "output", "engine", "workers")
    return GenerateConfig(prompts=prompts, **{name: getattr(config, name) for name in shared})


def _check_same_settings(config: PriorConfig) -> None:
    """Raise BadInput when the images that are there were made in another way."""
    lock = read_lock(config.output.uri)
    if lock is None or Manifest(config.output.uri).is_untouched():
        return
    before = dict(lock.segments[-1].job)
    after = job_part(_job(config, config.prompts))
    for part in (before, after):
        part["prompts"] = {"syntax": part["prompts"].get("syntax", "plain")}
        part["model"] = {k: v for k, v in part["model"].items() if k not in ("uri", "config")}
    if changed := differences(before, after):
        raise BadInput(
            f"{config.output.uri} holds class images made with other settings; choose another "
            "output.uri, or go back to:\n" + "\n".join(changed)
        )


def _judge_all(uri: str) -> Iterator[ClassImage]:
    """All class images, with what is wrong with them, judged by their pixels."""
    lock = read_lock(uri)
    if lock is None:
        return
    images, manifest = [], Manifest(uri, lock.format)
    for entry in manifest.entries():
        for row in manifest.format.read(manifest.data, entry["shard"], COLUMNS):
            images.append(_judge(row))
    good = [image for image in images if image.signature is not None]
    signatures = [image.signature for image in good if image.signature is not None]
    first = duplicates.groups(duplicates.pack(signatures)) if signatures else []
    for number, image in enumerate(good):
        if first[number] != number:
            image.fault = "near-duplicate"
    yield from images


def _judge(row: dict[str, Any]) -> ClassImage:
    key = (row["prompt"], row["seed"])
    if row["status"] != "ok":
        return ClassImage(row["record"], key, "failed", None)
    measured = pixels.measure(Image.open(io.BytesIO(row["image"]["bytes"])))
    if measured["blank"]:
        return ClassImage(row["record"], key, "blank", None)
    signature = pixels.Signature(measured["phash"], measured["colours"])
    return ClassImage(row["record"], key, None, signature)


def _missing(
    config: PriorConfig, prompts: list[str], images: list[ClassImage], seeds: _Seeds
) -> list[Key]:
    """Prompts and seeds of the images that are still to be made."""
    made = Counter(image.key[0] for image in images)
    return [
        (prompt, seeds.next(prompt))
        for prompt in prompts
        for _ in range(config.num_images - made[prompt])
    ]


def _make(config: PriorConfig, rows: list[Key]) -> int:
    """Append a segment with these images, or go on with one that was begun."""
    lock = read_lock(config.output.uri)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.parquet"
        if lock is not None and not _is_complete(config.output.uri, lock):
            rows = _last_rows(config.output.uri, lock)
        names = ("prompt", "seed")
        columns = {name: [row[n] for row in rows] for n, name in enumerate(names)}
        pq.write_table(pa.table(columns), path)
        source = PromptsConfig(uri=str(path), syntax=config.prompts.syntax)
        made = job.run(_job(config, source), extend=True)
    return made.num_made


def _is_complete(uri: str, lock: Lock) -> bool:
    return bool(Manifest(uri, lock.format).committed(lock.num_shards).all())


def _last_rows(uri: str, lock: Lock) -> list[Key]:
    """The rows of the last segment."""
    rows = Snapshot(snapshot_uri(uri, len(lock.segments) - 1))
    return [(row["prompt"], row["seed"]) for row in (rows.row(n) for n in range(len(rows)))]


def _replace(config: PriorConfig, bad: list[ClassImage], seeds: _Seeds) -> int:
    """Make each refused image's record again, with the next seed of its prompt."""
    lock = read_lock(config.output.uri)
    assert lock is not None
    redo: dict[int, dict[int, int]] = {}
    for image in bad:
        shard = lock.segment_of_record(image.record).shard_of(image.record)
        redo.setdefault(shard, {})[image.record] = seeds.next(image.key[0])
    print(f"replacing {len(bad)} of the class images", file=sys.stderr)
    return job.make_again(_job(config, config.prompts), lock, redo)


def _refused_uri(uri: str) -> str:
    return storage.join(uri, "refused.json")


def _read_refused(uri: str) -> set[Key]:
    if not storage.exists(_refused_uri(uri)):
        return set()
    return {(prompt, seed) for prompt, seed in json.loads(storage.read_bytes(_refused_uri(uri)))}


def _write_refused(uri: str, refused: set[Key]) -> None:
    if refused:
        staging = storage.join(uri, "tmp")
        storage.write_bytes(_refused_uri(uri), canonical_json(sorted(refused)), staging)


def _describe(reasons: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in reasons.items())
