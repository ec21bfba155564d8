"""The generation job: check everything, lock it, let Ray Data carry shard numbers to workers.

Owns the order of events of one run. What a worker does is in `worker`, what is made in `spec` and
`lock`.
"""

import importlib.metadata
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from rayjobs import storage
from rayjobs.config import BadInput
from rayjobs.diffusion import weights
from rayjobs.generation import card, report
from rayjobs.generation.config import GenerateConfig
from rayjobs.generation.lock import (
    Lock,
    check_same,
    job_part,
    read_lock,
    snapshot_uri,
    write_lock,
)
from rayjobs.generation.manifest import Manifest
from rayjobs.generation.source import Snapshot, check_templates, list_pictures, write_snapshot
from rayjobs.generation.spec import Spec

LIBRARIES = ("torch", "diffusers", "transformers", "pillow", "pyarrow", "numpy")
SHARDS_PER_BLOCK = 64
T = TypeVar("T")


@dataclass(frozen=True)
class Summary:
    """What a run did: images made now, failed among them, and how long it took."""

    num_records: int
    num_made: int
    num_failed: int
    seconds: float
    output_uri: str


def run(config: GenerateConfig, limit: int | None = None) -> Summary:
    """Make what is missing of the data set; with `limit` only the shards of its first records.

    Raises BadInput, ValueError or StorageError before a worker starts when the job cannot be.
    """
    started = time.monotonic()
    lock = prepare(config)
    manifest = Manifest(config.output.uri)
    size = config.output.images_per_shard
    num_shards = lock.num_shards if limit is None else min(lock.num_shards, -(-limit // size))
    committed = manifest.committed()
    missing = [shard for shard in range(num_shards) if shard not in committed]
    made = failed = 0
    if missing:
        num_images = sum(min(size, lock.num_records - shard * size) for shard in missing)
        for row in _make(_anywhere(config), lock, missing, num_images):
            made += row["rows"]
            failed += row["failed"]
    if num_shards == lock.num_shards:
        manifest.clean()
    card.write(config, lock)
    report.write(config.output.uri)
    seconds = time.monotonic() - started
    return Summary(lock.num_records, made, failed, seconds, config.output.uri)


def prepare(config: GenerateConfig) -> Lock:
    """Check all that can be checked without a worker, and write or find the data set's lock."""
    check_templates(config.prompts)
    storage.check(config.output.uri)
    loras = [lora.uri for lora in config.model.loras]
    for uri in (config.prompts.uri, config.init.uri, config.model.uri, *loras):
        if uri is not None and storage.is_remote(uri):
            storage.check(uri)
    model = _check_model(config)
    _check_loras(config)
    with tempfile.TemporaryDirectory() as folder:
        snapshot = Path(folder) / "snapshot.parquet"
        num_prompts = write_snapshot(config.prompts, str(snapshot))
        lock = _resolve(config, snapshot, num_prompts, model)
        found = read_lock(config.output.uri)
        if found is None:
            write_lock(lock, config.output.uri)
        else:
            check_same(found, lock, config.output.uri)
        if not storage.exists(lock.snapshot_uri):  # nor is it when a run ended between the two
            storage.put_file(snapshot, lock.snapshot_uri)
    return lock


def _resolve(
    config: GenerateConfig, snapshot: Path, num_prompts: int, model: weights.Weights
) -> Lock:
    rows = Snapshot(str(snapshot))
    init_images = list_pictures(config.init.uri) if config.init.uri else []
    spec = Spec(config, rows, init_images)
    guidance = config.sampler.guidance_scale
    per_row = "guidance_scale" in rows.columns
    return Lock(
        job=job_part(config),
        prompts_sha256=weights.sha256_of(snapshot),
        snapshot_uri=snapshot_uri(storage.absolute(config.output.uri)),
        num_prompts=num_prompts,
        init_images=tuple(init_images),
        model_name=_model_name(config.model.uri),
        model_sha256=model.sha256,
        guided=guidance is None or guidance > 1 or per_row,
        num_records=len(spec),
        num_shards=spec.num_shards,
        libraries={name: importlib.metadata.version(name) for name in LIBRARIES},
    )


def _model_name(uri: str) -> str:
    """The model's name in records, the same wherever a local copy of it lies."""
    return Path(uri).name if Path(uri).exists() else uri


def _check_model(config: GenerateConfig) -> weights.Weights:
    uri = config.model.uri
    local = _named("model.uri", lambda: str(storage.fetch(uri)) if storage.is_remote(uri) else uri)
    model = _named("model.uri", lambda: weights.locate(local))
    from rayjobs.diffusion.sampler import resolve

    name = config.sampler.name or model.scheduler_name
    _named("sampler", lambda: resolve(name, config.sampler.options, model.is_edm))
    return model


def _check_loras(config: GenerateConfig) -> None:
    from rayjobs.diffusion.lora import weight_file

    for lora in config.model.loras:
        _named("model.loras", lambda uri=lora.uri: weight_file(storage.fetch(uri)))


def _anywhere(config: GenerateConfig) -> GenerateConfig:
    """The job as a worker in any working directory can read it: with absolute local paths."""
    values = config.model_dump()
    places = [(values["output"], "uri"), (values["prompts"], "uri"), (values["init"], "uri")]
    places += [(lora, "uri") for lora in values["model"]["loras"]]
    if Path(config.model.uri).exists():
        places.append((values["model"], "uri"))
    for part, key in places:
        if part[key] is not None:
            part[key] = storage.absolute(part[key])
    return GenerateConfig.model_validate(values)


def _named(key: str, check: Callable[[], T]) -> T:
    """The check's result; what it refuses is told with the key that is to be changed."""
    try:
        return check()
    except (ValueError, ImportError) as error:
        raise BadInput(f"{key}: {error}") from None


def _make(
    config: GenerateConfig, lock: Lock, shards: list[int], num_images: int
) -> Iterator[dict[str, int]]:
    """Run the missing shards on Ray; yield a row of figures for each that is committed."""
    import ray

    from rayjobs.generation.progress import Progress
    from rayjobs.generation.worker import RayShardWorker

    with _ray_session(config), Progress(num_images) as progress:
        workers = config.workers
        most = min(workers.max or workers.min, len(shards))
        per_block = max(1, min(SHARDS_PER_BLOCK, len(shards) // (4 * most)))
        numbers = ray.data.from_items(
            [{"id": shard} for shard in shards],
            override_num_blocks=-(-len(shards) // per_block),
        )
        rows = numbers.map_batches(
            RayShardWorker,
            fn_constructor_args=(
                config.model_dump(mode="json"),
                lock.model_dump(mode="json"),
                progress.counter,
            ),
            compute=ray.data.ActorPoolStrategy(min_size=min(workers.min, most), max_size=most),
            batch_size=per_block,
            num_cpus=workers.num_cpus,
            num_gpus=workers.num_gpus or None,
        )
        yield from rows.iter_rows()


@contextmanager
def _ray_session(config: GenerateConfig) -> Generator[None]:
    """The cluster that RAY_ADDRESS or a surrounding job names, else one of our own, ended after."""
    import ray.data

    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not ray.is_initialized() and not os.environ.get("RAY_ADDRESS"):
        # Ray Data needs a CPU beside the workers: without one it would wait for ever.
        workers = config.workers
        needed = math.ceil((workers.max or workers.min) * workers.num_cpus) + 1
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, needed),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
        own = True
    else:
        own = False
        if not ray.is_initialized():
            ray.init(log_to_driver=False, logging_level=logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.verbose_progress = False
    try:
        yield
    finally:
        if own:
            ray.shutdown()
