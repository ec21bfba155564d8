"""A small training in this process: its settings and all its steps; no Ray, no checkpoints."""

import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from rayjobs.dreambooth.config import DreamBoothConfig
from rayjobs.dreambooth.data.photos import find_photos
from rayjobs.dreambooth.resolved import ResolvedRun
from rayjobs.dreambooth.training import worker
from rayjobs.dreambooth.training.tuned_model import TunedModel

RANK, ALPHA = 4, 2
PRIOR_WEIGHT = 0.7
SIZES = {"0.png": (80, 64), "1.png": (64, 96)}
"""Width and height of the photographs; class images are 64 x 64."""


def settings(model: Path, photos: Path, mode: str = "images", **train: Any) -> DreamBoothConfig:
    usual = {"steps": 2, "global_batch_size": 2, "learning_rate": 1e-2, "text_encoders": True}
    small = {"resolution": 64, "crops": 1, "buckets": False, "weight_decay": 0}
    prior = {"prompt": "a photo of a star", "uri": str(photos / "class"), "weight": PRIOR_WEIGHT}
    return DreamBoothConfig.model_validate(
        {
            "model": {"uri": str(model)},
            "instance": {"uri": str(photos / "subject"), "prompt": "a photo of a sks star"},
            "prior": prior | {"mode": mode},
            "train": usual | small | train,
            "lora": {"rank": RANK, "alpha": ALPHA, "targets": "transformer"},
            "run": {"name": "test"},
            "output": {"uri": "unused", "cache": False, "kohya": True, "peft": True, "fused": True},
        }
    )


def resolved(config: DreamBoothConfig) -> ResolvedRun:
    photos = find_photos(config.instance.uri, config.instance.prompt)
    has_prior = config.prior.mode != "none"
    images = find_photos(str(config.prior.uri), str(config.prior.prompt)) if has_prior else []
    return ResolvedRun(config, "", tuple(photos), tuple(images))


class StepMetrics(pl.Callback):
    """The metrics of every step."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.rows.append(pl_module.metrics)


def fit(run: ResolvedRun) -> tuple[TunedModel, list[dict[str, float]]]:
    """Every step of a run; the tuned model and each step's metrics."""
    config = run.config
    model = worker.load(config, "cpu", torch.float32)
    batches, module = worker.build(run, model, torch.float32)
    batches.fill_cache(0, 1)
    seen = StepMetrics()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        callbacks=[seen],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=1,
    )
    most = config.train.micro_batch_size
    with warnings.catch_warnings():
        # Frozen networks are not in training mode, on purpose.
        warnings.filterwarnings("ignore", "Found .* in eval mode")
        trainer.fit(module, train_dataloaders=batches.steps(0, config.train.steps, 0, 1, most))
    assert [row["step"] for row in seen.rows] == list(range(1, config.train.steps + 1))
    return module.tuned.eval(), seen.rows


def opened(folder: Path) -> Any:
    xl = "XL" in (folder / "model_index.json").read_text()
    return (StableDiffusionXLPipeline if xl else StableDiffusionPipeline).from_pretrained(folder)


def differ(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().max().item()
