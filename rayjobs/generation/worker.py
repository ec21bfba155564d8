"""A worker: one engine that makes whole shards and commits them.

Owns the way from shard numbers to committed shards inside one process. A plain class: Ray Data
wraps it, tests call it.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rayjobs import storage
from rayjobs.diffusion.engine import Engine
from rayjobs.diffusion.model import Model, ModelOptions, load_model
from rayjobs.diffusion.request import Lora, Request, Result
from rayjobs.diffusion.sampler import EDM, resolve
from rayjobs.generation.config import GenerateConfig, ModelConfig
from rayjobs.generation.lock import Lock
from rayjobs.generation.manifest import Manifest
from rayjobs.generation.shard import Shard, encode_png
from rayjobs.generation.source import Snapshot
from rayjobs.generation.spec import Record, Spec
from rayjobs.records import ENGINE_VERSION, image_id, schema

SAVING_THREADS = 2


@dataclass(eq=False)
class _Pending:
    """A record on its way through the engine."""

    record: Record
    shard: Shard
    init_sha256: str | None


class ShardWorker:
    """Holds the model and makes shards; `report(images, failed)` hears of every finished image."""

    def __init__(
        self,
        config: GenerateConfig,
        lock: Lock,
        report: Callable[[int, int], None] = lambda images, failed: None,
    ):
        pin_threads(config)
        self.config = config
        self.lock = lock
        self.manifest = Manifest(config.output.uri)
        snapshot = Snapshot(lock.snapshot_uri)
        self.spec = Spec(config, snapshot, lock.init_images)
        self.schema = schema(snapshot.passed_through)
        self.model = load(config.model)
        if self.model.sha256 != lock.model_sha256:
            raise ValueError(
                f"model {config.model.uri} changed while the job ran: "
                f"{self.model.sha256[:12]} is not {lock.model_sha256[:12]}"
            )
        places = 2 * config.engine.batch_size if lock.guided else config.engine.batch_size
        self.engine = Engine(self.model, config.engine.batch_size, places=places)
        self.loras = tuple(
            Lora(path=str(storage.fetch(lora.uri)), scale=lora.scale) for lora in config.model.loras
        )
        self.lora_ids = [[self.engine.loras.load(lora.path), lora.scale] for lora in self.loras]
        self._report = report
        self._pending: dict[Request, _Pending] = {}
        self._saving = ThreadPoolExecutor(SAVING_THREADS, thread_name_prefix="saving")

    def make(self, shards: Iterable[int]) -> Iterator[dict[str, Any]]:
        """Make the shards that are not committed yet; yield each one's manifest entry, as it is."""
        started = time.monotonic()
        commits: list[Future[dict[str, Any]]] = []
        for result in self.engine.generate(self._requests(shards)):
            pending = self._pending.pop(result.request)
            self._put(pending, result)
            if pending.shard.is_complete:
                seconds = time.monotonic() - started
                commits.append(self._saving.submit(self._commit, pending.shard, seconds))
            while commits and commits[0].done():
                yield commits.pop(0).result()
        for commit in commits:
            yield commit.result()

    def _requests(self, shards: Iterable[int]) -> Iterator[Request]:
        """Requests for all records of the shards, one shard after the other without a gap."""
        for number in shards:
            if self.manifest.is_committed(number):
                continue
            shard = Shard(number, self.spec.shard(number), self.schema)
            for k in shard.numbers:
                record = self.spec.record(k)
                init = _read_init(record)
                request = self._request(record, init)
                sha256 = hashlib.sha256(init).hexdigest() if init else None
                self._pending[request] = _Pending(record, shard, sha256)
                yield request

    def _request(self, record: Record, init: bytes | None) -> Request:
        sampler = self.config.sampler
        return Request(
            prompt=record.prompt,
            negative_prompt=record.negative_prompt,
            seed=record.seed,
            steps=record.steps,
            sampler=sampler.name,
            sampler_options=sampler.options,
            guidance_scale=record.guidance_scale,
            guidance_rescale=sampler.guidance_rescale,
            clip_skip=sampler.clip_skip,
            width=record.width,
            height=record.height,
            init_image=init,
            strength=record.strength,
            loras=self.loras,
        )

    def _put(self, pending: _Pending, result: Result) -> None:
        image = None if result.image is None else encode_png(result.image)
        columns = self._columns(pending, result)
        pending.shard.put(pending.record, image, columns)
        self._report(1, int(image is None))

    def _columns(self, pending: _Pending, result: Result) -> dict[str, Any]:
        record, model = pending.record, self.model
        side = model.default_side
        width, height = result.image.size if result.image else (record.width, record.height)
        guidance = record.guidance_scale
        facts = {
            "guidance_scale": model.default_guidance_scale if guidance is None else guidance,
            "width": width or side,
            "height": height or side,
        }
        return {
            **facts,
            "image_id": self._image_id(pending, facts),
            "sampler": self.config.sampler.name or type(model.scheduler).__name__,
            "model": self.lock.model_name,
            "model_sha256": model.sha256,
            "warnings": "; ".join(result.warnings) or None,
            "error": result.error,
        }

    def _image_id(self, pending: _Pending, facts: dict[str, Any]) -> str:
        """Over everything that decides the pixels, and nothing else."""
        record, sampler, model = pending.record, self.config.sampler, self.config.model
        own = type(self.model.scheduler).__name__
        sampler_class, options = resolve(sampler.name or own, sampler.options, own in EDM)
        return image_id(
            {
                "prompt": record.prompt,
                "negative_prompt": record.negative_prompt,
                "seed": record.seed,
                "sampler": sampler_class.__name__,
                "sampler_options": options,
                "steps": record.steps,
                **facts,
                "guidance_rescale": sampler.guidance_rescale,
                "clip_skip": sampler.clip_skip,
                "strength": record.strength if pending.init_sha256 else None,
                "init_sha256": pending.init_sha256,
                "model_sha256": self.model.sha256,
                "loras": self.lora_ids,
                "dtype": str(self.model.dtype).removeprefix("torch."),
                "vae": [str(self.model.vae.dtype), model.vae_slicing, model.vae_tiling],
                "batch_size": self.config.engine.batch_size,
                "places": self.engine.num_places,
                "engine": ENGINE_VERSION,
            }
        )

    def _commit(self, shard: Shard, seconds: float) -> dict[str, Any]:
        facts = {
            "rows": len(shard.numbers),
            "failed": shard.num_failed,
            "seconds": round(seconds, 3),
        }
        return self.manifest.commit(shard.number, shard.encode(), facts)


class RayShardWorker:
    """What Ray Data calls: a batch of shard numbers in, a row for each committed shard out."""

    def __init__(self, config: dict[str, Any], lock: dict[str, Any], progress: Any):
        self.progress = progress
        self.worker = ShardWorker(
            GenerateConfig.model_validate(config), Lock.model_validate(lock), self._report
        )

    def __call__(self, batch: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        for entry in self.worker.make(int(number) for number in batch["id"]):
            row = {key: entry[key] for key in ("shard", "rows", "failed", "bytes", "seconds")}
            yield {key: np.array([value]) for key, value in row.items()}

    def _report(self, images: int, failed: int) -> None:
        self.progress.add.remote(images, failed)


def load(config: ModelConfig) -> Model:
    """The model of a configuration, fetched to this machine first when it is elsewhere."""
    options = ModelOptions(
        dtype=config.dtype,
        device=config.device,
        vae_dtype=config.vae_dtype,
        attention=config.attention,
        channels_last=config.channels_last,
        compile=config.compile,
        vae_slicing=config.vae_slicing,
        vae_tiling=config.vae_tiling,
    )
    parts = None if config.config is None else local_model(config.config)
    return load_model(local_model(config.uri), options, config=parts)


def local_model(uri: str) -> str:
    """What `load_model` takes: storage URIs as local paths, names and hub ids as they are."""
    return str(storage.fetch(uri)) if storage.is_remote(uri) else uri


def pin_threads(config: GenerateConfig) -> None:
    """As many threads as CPUs were asked for: their number moves the last bits of a picture."""
    torch.set_num_threads(max(1, int(config.workers.num_cpus)))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _read_init(record: Record) -> bytes | None:
    """The init image's bytes; none at all when it cannot be read, which its record then says."""
    if record.init_uri is None:
        return None
    try:
        return storage.read_bytes(record.init_uri)
    except OSError:
        return b""
