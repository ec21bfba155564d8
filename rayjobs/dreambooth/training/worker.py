"""What each Ray Train worker does: load, resume, train.

Owns how the parts are assembled in one process. `module` says what a step is, `job` where workers
run.
"""

import logging
import os
import time
import uuid
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytorch_lightning as pl
import ray
import ray.train
import ray.train.torch
import torch
from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment

from rayjobs import storage
from rayjobs.config import BadInput
from rayjobs.diffusion.model import Model
from rayjobs.dreambooth import results
from rayjobs.dreambooth.checkpoints import Checkpoints
from rayjobs.dreambooth.config import DreamBoothConfig
from rayjobs.dreambooth.data.cache import Cache
from rayjobs.dreambooth.data.schedule import BatchSchedule
from rayjobs.dreambooth.resolved import ResolvedRun
from rayjobs.dreambooth.training import trackers
from rayjobs.dreambooth.training.batches import Batch, Batches
from rayjobs.dreambooth.training.callback import CheckpointCallback, CheckpointOnNotice
from rayjobs.dreambooth.training.fsdp import RayFSDP2
from rayjobs.dreambooth.training.held_out import HeldOutLoss
from rayjobs.dreambooth.training.module import DreamBooth
from rayjobs.dreambooth.training.objective import build_objective
from rayjobs.dreambooth.training.tuned_model import TunedModel
from rayjobs.models.loading import load_weights
from rayjobs.models.options import LoadOptions
from rayjobs.progress import DEVICE, DOING, FATAL
from rayjobs.telemetry.meters import Meters, RayMeters, Totals
from rayjobs.watchdog import Beat

STORAGE_WAIT_S = 900.0
"""How long workers wait for a storage server that cannot be reached."""
ERRORS = "errors"
PERMANENT_ERRORS = (ValueError, TypeError, KeyError, FloatingPointError, torch.OutOfMemoryError)
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def train(settings: dict[str, Any]) -> None:
    """Train this worker's share. Runs in every worker, again after each change of their number.

    An error that would occur again is reported to the driver and ends the run; for one that may be
    due to this machine, Ray starts all workers again.
    """
    counter = settings["counter"]
    if FATAL in ray.get(counter.read.remote())[1]:
        return
    rank, num_workers = _rank_and_world_size()
    beat = Beat(f"rank {rank} of {num_workers} on {os.uname().nodename}", counter.beat.remote)
    try:
        with beat.working(lambda: "its start"):
            _train(settings["run"], counter, beat)
    except Exception as error:
        _report_error(error, counter)
        raise


def _report_error(error: Exception, counter: Any) -> None:
    """Note an error; a permanent one, or one that occurs twice at one step, is fatal."""
    done, notes = ray.get(counter.read.remote())
    kind = "" if isinstance(error, (BadInput, FloatingPointError)) else f"{type(error).__name__}: "
    message = kind + str(error).strip().split("\n")[0]
    earlier = notes.get(ERRORS, [])
    note: dict[str, Any] = {ERRORS: [*earlier, (done, message)]}
    if isinstance(error, PERMANENT_ERRORS) or (done, message) in earlier:
        note = {FATAL: message}
    ray.get(counter.set.remote(done, **note))


def _train(run: ResolvedRun, counter: Any, beat: Beat) -> None:
    config = run.config
    storage.be_patient(STORAGE_WAIT_S)
    _silence_lightning()
    _set_threads(config)
    device = ray.train.torch.get_device()
    rank, num_workers = _rank_and_world_size()
    compute = choose_precision(config.train.precision, device.type)
    model = load(config, str(device), compute)
    prefers_sharding = config.train.strategy == "fsdp" or model.family == "sdxl"
    sharded = prefers_sharding and may_shard(config, device.type)
    batches, module = build(run, model, compute, sharded)
    checkpoints = Checkpoints(run.checkpoints_uri)
    first, attempt = _agree_on_start(checkpoints, rank)
    checkpointing = CheckpointCallback(run, rank, num_workers, sharded, attempt)
    checkpointing.resume(first)
    tell = partial(_tell_encoding, counter if rank == 0 else None, beat)
    batches.fill_cache(rank, num_workers, tell)
    _wait_for_all()
    looking = []
    if config.validation.loss_every_n_steps:
        looking.append(HeldOutLoss(run, batches, rank, num_workers))
        looking[0].history = results.read_losses(config.output.uri, first)
    steps = _StepBatches(batches, config, first, rank, num_workers, sharded)
    strategy: Any = RayFSDP2() if sharded else RayDDPStrategy(gradient_as_bucket_view=True)
    trainer = pl.Trainer(
        accelerator=device.type if device.type == "cpu" else "gpu",
        devices="auto",
        strategy=strategy,
        plugins=[RayLightningEnvironment()],
        # The loss is measured before the checkpoint's metrics are written.
        callbacks=[
            *looking,
            checkpointing,
            CheckpointOnNotice(checkpointing, ray.train.get_preemption_info),
            _Told(counter, checkpointing, RayMeters(config.output.uri), beat),
        ],
        logger=trackers.build(config, checkpointing.logs) if rank == 0 else False,
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
    """The batches and the module that trains on them."""
    config = run.config
    side = config.train.resolution or model.default_side
    schedule = BatchSchedule(config.train, run.subjects, side, model.vae_scale)
    objective = build_objective(
        model.scheduler,
        config.train.min_snr_gamma,
        config.train.edm_sigmas,
        config.train.debiased,
    )
    tuned = TunedModel(model, config, compute)
    cache = None
    if config.output.cache:
        cache = Cache(run.cache_uri, model.sha256)
    fixed = schedule.fixed_rows(run.held_out, config.validation.loss_levels)
    batches = Batches(schedule, tuned, objective, cache, config.train.noise_offset, fixed)
    counts = (schedule.num_instance, schedule.num_prior)
    module = DreamBooth(config, tuned, objective, *counts, sharded)
    return batches, module


def load(config: DreamBoothConfig, device: str, compute: torch.dtype) -> Model:
    """The model to tune: in float32 where all of it is trained, else in the compute dtype."""
    is_full = config.train.method == "full"
    options = LoadOptions(
        dtype="float32" if is_full else str(compute).removeprefix("torch."),  # type: ignore
        vae_dtype="float32",
        device=device,
        attention=config.model.attention,
        channels_last=not may_shard(config, device),  # FSDP2 takes contiguous weights only
    )
    return load_weights(config.model, options, onednn=False)


def choose_precision(name: str, device: str) -> torch.dtype:
    if name == "auto":
        return torch.float32 if device == "cpu" else torch.bfloat16
    if name == "fp16" and device == "cpu":
        raise BadInput("train.precision fp16 needs a GPU; use fp32 or bf16 on a CPU")
    return PRECISIONS[name]


class _StepBatches:
    """The remaining steps' batches, as Lightning's data loader."""

    def __init__(
        self,
        batches: Batches,
        config: DreamBoothConfig,
        first: int,
        rank: int,
        num_workers: int,
        sharded: bool,
    ):
        self._steps = partial(batches.steps, equal=sharded)
        self._range = (first, config.train.steps)
        self._share = (rank, num_workers, config.train.micro_batch_size)

    def __len__(self) -> int:
        return self._range[1] - self._range[0]

    def __iter__(self) -> Iterator[list[Batch]]:
        return self._steps(*self._range, *self._share)


class _Told(pl.Callback):
    """Reports each step to the driver's progress bar and to the meters, once for all workers."""

    def __init__(self, counter: Any, checkpointing: CheckpointCallback, meters: Meters, beat: Beat):
        self._counter, self._beat = counter, beat
        self._checkpointing, self._meters = checkpointing, meters
        self._totals = Totals(meters)
        self._last = time.monotonic()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.is_global_zero and self._counter is not None:
            self._counter.begin.remote(**{DEVICE: _name_of(pl_module.device)})
            self._meters.add("restarts")
        self._last = time.monotonic()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._beat.tick(f"step {pl_module.step}")
        if trainer.is_global_zero and self._counter is not None:
            loss = f"{pl_module.metrics['loss']:.4f}"
            self._counter.set.remote(pl_module.step, loss=loss, workers=trainer.world_size)
            self._count(pl_module)

    def _count(self, module: Any) -> None:
        last, self._last = self._last, time.monotonic()
        self._meters.add("steps")
        self._meters.add("step_seconds", self._last - last)
        self._meters.set("step", module.step)
        self._meters.set("loss", float(module.metrics["loss"]))
        self._totals.tell(
            checkpoint_stall_seconds=self._checkpointing.stalled_s,
            commits=self._checkpointing.num_stored,
            commit_seconds=self._checkpointing.stored_s,
            storage_retries=storage.num_retries(),
        )


def _name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()


def _tell_encoding(counter: Any, beat: Beat, done: int, total: int) -> None:
    beat.tick(f"picture {done:,} of {total:,} to encode")
    if counter is not None:
        doing = f"encoding pictures: {done:,} of {total:,} of the first worker's"
        counter.set.remote(0, **{DOING: doing})


def _rank_and_world_size() -> tuple[int, int]:
    context = ray.train.get_context()
    return context.get_world_rank(), context.get_world_size()


def may_shard(config: DreamBoothConfig, device: str) -> bool:
    """Whether weights may be sharded over the workers; `auto`: only full fine-tuning on GPUs."""
    if config.train.strategy != "auto":
        return config.train.strategy == "fsdp"
    has_many = config.workers.max_workers > 1
    return has_many and config.train.method == "full" and device.startswith("cuda")


def _agree_on_start(checkpoints: Checkpoints, rank: int) -> tuple[int, str]:
    """The step to resume from, as the first worker sees it, and a name for this start.

    Another worker might already see a checkpoint that an earlier start has just finished writing.
    """
    start: list[Any] = [0, uuid.uuid4().hex[:12]]
    if rank == 0:
        latest = checkpoints.latest()
        start[0] = latest.step if latest is not None else 0
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(start, src=0)
    return start[0], start[1]


def _wait_for_all() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def _set_threads(config: DreamBoothConfig) -> None:
    torch.set_num_threads(max(1, int(config.workers.num_cpus)))
    torch.backends.cudnn.benchmark = False


def _silence_lightning() -> None:
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
