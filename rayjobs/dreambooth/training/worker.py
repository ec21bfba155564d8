"""What each Ray Train worker does: load, resume, train.

Owns how the parts are put together in one process. What a step is lies in `module`; where workers
run lies in `job`.
"""

import logging
import uuid
import warnings
from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl
import ray
import ray.train
import ray.train.torch
import torch
from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment

from rayjobs import storage
from rayjobs.config import BadInput
from rayjobs.diffusion.model import Model, ModelOptions, load_model
from rayjobs.dreambooth.config import DreamBoothConfig
from rayjobs.dreambooth.data.cache import Cache
from rayjobs.dreambooth.data.schedule import Curriculum
from rayjobs.dreambooth.resolved import ResolvedRun
from rayjobs.dreambooth.training import trackers
from rayjobs.dreambooth.training.batches import Batch, Batches
from rayjobs.dreambooth.training.callback import Saving
from rayjobs.dreambooth.training.checkpoints import Checkpoints
from rayjobs.dreambooth.training.fsdp import RayFSDP2
from rayjobs.dreambooth.training.module import DreamBooth
from rayjobs.dreambooth.training.networks import Networks
from rayjobs.dreambooth.training.objective import build_objective

PATIENCE_S = 900.0
"""How long workers wait for a storage server that is away."""
FATAL, ERRORS = "fatal", "errors"
HOPELESS = (ValueError, TypeError, KeyError, FloatingPointError, torch.OutOfMemoryError)
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def train(settings: dict[str, Any]) -> None:
    """Train this worker's share. Runs in every worker, again after each change of their number.

    An error that would come again is told to the driver, and nothing more is tried; what may be the
    fate of one machine is left to Ray, which starts all workers anew.
    """
    counter = settings["counter"]
    if FATAL in ray.get(counter.read.remote())[1]:
        return
    try:
        _train(settings["run"], counter)
    except Exception as error:
        _tell(error, counter)
        raise


def _tell(error: Exception, counter: Any) -> None:
    """Note an error; one that no machine can help, or that comes at one step twice, is fatal."""
    done, notes = ray.get(counter.read.remote())
    kind = "" if isinstance(error, (BadInput, FloatingPointError)) else f"{type(error).__name__}: "
    words = kind + str(error).strip().split("\n")[0]
    known = notes.get(ERRORS, [])
    note: dict[str, Any] = {ERRORS: [*known, (done, words)]}
    if isinstance(error, HOPELESS) or (done, words) in known:
        note = {FATAL: words}
    ray.get(counter.set.remote(done, **note))


def _train(run: ResolvedRun, counter: Any) -> None:
    config = run.config
    storage.be_patient(PATIENCE_S)
    _quiet()
    _pin(config)
    device = ray.train.torch.get_device()
    rank, num_workers = _place()
    compute = choose_precision(config.train.precision, device.type)
    model = load(config, str(device), compute)
    wants_shards = config.train.strategy == "fsdp" or model.family == "sdxl"
    sharded = wants_shards and may_shard(config, device.type)
    batches, module = build(run, model, compute, sharded)
    checkpoints = Checkpoints(run.checkpoints_uri)
    first, attempt = _agree_on_start(checkpoints, rank)
    saver = Saving(run, rank, num_workers, sharded, attempt)
    saver.resume(first)
    batches.fill_cache(rank, num_workers)
    _wait_for_all()
    steps = _Steps(batches, config, first, rank, num_workers)
    strategy: Any = RayFSDP2() if sharded else RayDDPStrategy(gradient_as_bucket_view=True)
    trainer = pl.Trainer(
        accelerator=device.type if device.type == "cpu" else "gpu",
        devices="auto",
        strategy=strategy,
        plugins=[RayLightningEnvironment()],
        callbacks=[saver, _Reporting(counter)],
        logger=trackers.build(config, saver.logs) if rank == 0 else False,
        max_epochs=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, train_dataloaders=steps)


def build(
    run: ResolvedRun, model: Model, compute: torch.dtype, sharded: bool = False
) -> tuple[Batches, DreamBooth]:
    """What makes the batches, and what trains on them."""
    config = run.config
    side = config.train.resolution or model.default_side
    curriculum = Curriculum(config.train, run.photos, run.class_images, side, model.vae_scale)
    aim = build_objective(model.scheduler, config.train.min_snr_gamma, config.train.edm_sigmas)
    networks = Networks(model, config, compute)
    cache = None
    if config.output.cache:
        cache = Cache(run.cache_uri, model.sha256)
    batches = Batches(curriculum, networks, aim, cache, config.train.noise_offset)
    counts = (curriculum.num_instance, curriculum.num_prior)
    module = DreamBooth(config, networks, aim, *counts, sharded)
    return batches, module


def load(config: DreamBoothConfig, device: str, compute: torch.dtype) -> Model:
    """The model to tune: in float32 where all of it is trained, else in the math's dtype."""
    is_full = config.train.method == "full"
    options = ModelOptions(
        dtype="float32" if is_full else str(compute).removeprefix("torch."),  # type: ignore
        vae_dtype="float32",
        device=device,
        attention=config.model.attention,
        onednn=False,
        channels_last=not may_shard(config, device),  # FSDP2 takes contiguous weights only
    )
    parts = None if config.model.config is None else storage.to_local(config.model.config)
    return load_model(storage.to_local(config.model.uri), options, config=parts)


def choose_precision(name: str, device: str) -> torch.dtype:
    if name == "auto":
        return torch.float32 if device == "cpu" else torch.bfloat16
    if name == "fp16" and device == "cpu":
        raise BadInput("train.precision fp16 needs a GPU; use fp32 or bf16 on a CPU")
    return PRECISIONS[name]


class _Steps:
    """The steps that are left, as Lightning wants its data."""

    def __init__(
        self, batches: Batches, config: DreamBoothConfig, first: int, rank: int, num_workers: int
    ):
        self._make = batches.steps
        self._range = (first, config.train.steps)
        self._share = (rank, num_workers, config.train.micro_batch_size)

    def __len__(self) -> int:
        return self._range[1] - self._range[0]

    def __iter__(self) -> Iterator[list[Batch]]:
        return self._make(*self._range, *self._share)


class _Reporting(pl.Callback):
    """Tells the driver's bar how far the run is."""

    def __init__(self, counter: Any):
        self._counter = counter

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.is_global_zero and self._counter is not None:
            loss = f"{pl_module.metrics['loss']:.4f}"
            self._counter.set.remote(pl_module.step, loss=loss, workers=trainer.world_size)


def _place() -> tuple[int, int]:
    context = ray.train.get_context()
    return context.get_world_rank(), context.get_world_size()


def may_shard(config: DreamBoothConfig, device: str) -> bool:
    """Whether weights may be spread over the workers; by itself only full fine-tuning on GPUs."""
    if config.train.strategy != "auto":
        return config.train.strategy == "fsdp"
    many = config.workers.most > 1
    return many and config.train.method == "full" and device.startswith("cuda")


def _agree_on_start(checkpoints: Checkpoints, rank: int) -> tuple[int, str]:
    """The step to go on from, as the first worker sees it, and a name for this start.

    Another worker might see a checkpoint that a late writer has just finished.
    """
    found: list[Any] = [0, uuid.uuid4().hex[:12]]
    if rank == 0:
        latest = checkpoints.latest()
        found[0] = latest.step if latest is not None else 0
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(found, src=0)
    return found[0], found[1]


def _wait_for_all() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def _pin(config: DreamBoothConfig) -> None:
    torch.set_num_threads(max(1, int(config.workers.num_cpus)))
    torch.backends.cudnn.benchmark = False


def _quiet() -> None:
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
