"""A training step against the step of diffusers' own script: same model, pictures and threads.

`python -m benchmarks.training [--rounds 4] [--steps 8]` prints two tables and writes
benchmarks/training.json. The first has the seconds of one optimizer step of a LoRA with prior
preservation: of the script, of ours without caches, and of ours with them. Rounds alternate between
the three and the ratios are of medians, for machines are noisy. The second has the share of a run's
time in which training waits for checkpoints, on this machine's disk and, where AWS_ENDPOINT_URL
names a server, on S3. One device and no Ray: CUDA in bf16 where there is one, else the CPU in fp32.
"""

import argparse
import json
import logging
import os
import statistics
import tempfile
import time
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.optimization import get_scheduler
from peft import LoraConfig
from PIL import Image

from rayjobs import storage
from rayjobs.diffusion.weights import locate
from rayjobs.dreambooth import framing
from rayjobs.dreambooth.adapters import ATTENTION
from rayjobs.dreambooth.batches import Batch, Batches
from rayjobs.dreambooth.config import DreamBoothConfig
from rayjobs.dreambooth.saving import Saving
from rayjobs.dreambooth.worker import build, choose_precision, load
from rayjobs.starter import components, world

RANK = 16
RATE = 1e-4
WARM_UP = 2
LEAST_STEP_S = 0.2
"""Of a step beside which checkpoints are timed."""
SAVE_EVERY = 50
PROMPT, CLASS_PROMPT = "a photo of a sks star", "a photo of a star"
WANTED = {"no cache": 1.0, "cache": 1.3}
"""How many times the script's steps per second ours are to make."""
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Task:
    """What is trained on what, by each side alike."""

    name: str
    model: str
    side: int
    pictures: Path
    """Holds the folders `instance` and `class`."""
    outputs: str


def draw_pictures(folder: Path, side: int) -> None:
    """Four photographs, twice as large as they are trained at, and eight class images."""
    rng = np.random.default_rng(0)
    for name, number, size in (("instance", 4, 2 * side), ("class", 8, side)):
        (folder / name).mkdir(parents=True)
        for place in range(number):
            picture = world.draw(world.random_scene(rng), rng, size)
            Image.fromarray(picture).save(folder / name / f"{place}.png")


def build_narrow(folder: Path) -> Path:
    """A model with SDXL's blocks, but narrow and with random weights, below `folder`."""
    tokenizers = [
        components.save_tokenizer(folder / f"tokenizer-{number}", pad)
        for number, pad in enumerate((components.END, "!"))
    ]
    encoders = components.build_text_encoders(tokenizers[0])
    width = components.TEXT_WIDTH
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 4),
        attention_head_dim=(2, 4, 4),
        use_linear_projection=True,
        cross_attention_dim=2 * width,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=width + 6 * 8,
        norm_num_groups=16,
    )
    vae = AutoencoderKL(
        block_out_channels=[16, 32, 32, 32],
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=128,
    )
    pipeline: Any = StableDiffusionXLPipeline(
        vae=vae,
        unet=unet,
        text_encoder=encoders[0],
        text_encoder_2=encoders[1],
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        scheduler=components.build_scheduler(),
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder / "model")
    return folder / "model"


# diffusers' script


class Script:
    """The step of train_dreambooth_lora_sdxl.py, stated anew.

    From huggingface/diffusers at 58eb52c0803ea9af3abec60841c2a093bdf1f951,
    examples/dreambooth/train_dreambooth_lora_sdxl.py, with --with_prior_preservation, one instance
    prompt and frozen text encoders: both prompts are encoded once, the pictures in every step. What
    it costs to read pictures is left out in the script's favour: it opens and resizes each class
    image anew, and here all are tensors already. Nothing of accelerate is there but its autocast.
    """

    def __init__(self, task: Task, batch: int):
        self.batch, self.side = batch, task.side
        self.dtype = choose_precision("auto", DEVICE)
        folder = locate(task.model).path
        parts: Any = StableDiffusionXLPipeline.from_pretrained(
            folder, dtype=self.dtype, use_safetensors=True, add_watermarker=False
        ).to(DEVICE)
        self.unet, self.vae = parts.unet, parts.vae.to(torch.float32)
        for part in (self.vae, self.unet, parts.text_encoder, parts.text_encoder_2):
            part.requires_grad_(False)
        self.unet.add_adapter(
            LoraConfig(
                r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=[*ATTENTION]
            )
        )
        self.unet.train()
        self.noising: Any = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
        self.trained = [p for p in self.unet.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=RATE, weight_decay=1e-2, eps=1e-8)
        self.rates = get_scheduler("constant", self.optimizer, num_warmup_steps=0)
        said = [_encode_prompt(parts, prompt) for prompt in (PROMPT, CLASS_PROMPT)]
        self.states_2LD, self.pooled_2P = (torch.cat(both) for both in zip(*said, strict=True))
        self.instances = _read_pictures(task.pictures / "instance", task.side)
        self.classes = _read_pictures(task.pictures / "class", task.side)
        self._made = 0

    def run(self, num_steps: int) -> list[float]:
        """Make steps; return when each was done."""
        marks = []
        for _ in range(num_steps):
            self.step()
            marks.append(time.perf_counter())
        return marks

    def step(self) -> float:
        places = range(self._made * self.batch, (self._made + 1) * self.batch)
        self._made += 1
        shown = [self.instances[place % len(self.instances)] for place in places]
        preserved = [self.classes[place % len(self.classes)] for place in places]
        pixels_BCHW = torch.stack(shown + preserved).contiguous().float().to(DEVICE)
        z_BCHW = self.vae.encode(pixels_BCHW).latent_dist.sample()
        z_BCHW = (z_BCHW * self.vae.config.scaling_factor).to(self.dtype)
        noise_BCHW = torch.randn_like(z_BCHW)
        num_levels = self.noising.config.num_train_timesteps
        timesteps_B = torch.randint(0, num_levels, (len(z_BCHW),), device=DEVICE)
        x_BCHW = self.noising.add_noise(z_BCHW, noise_BCHW, timesteps_B)
        loss = self._loss(self._predict(x_BCHW, timesteps_B), noise_BCHW)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.rates.step()
        self.optimizer.zero_grad()
        return loss.detach().item()

    def _predict(self, x_BCHW: torch.Tensor, timesteps_B: torch.Tensor) -> torch.Tensor:
        seen = [2 * self.side, 2 * self.side, 0, 0, self.side, self.side]
        ids = [torch.tensor([seen]).to(DEVICE, self.dtype) for _ in timesteps_B]
        added = {"time_ids": torch.cat(ids), "text_embeds": self.pooled_2P.repeat(self.batch, 1)}
        with torch.autocast(DEVICE, self.dtype, enabled=self.dtype != torch.float32):
            return self.unet(
                x_BCHW,
                timesteps_B,
                self.states_2LD.repeat(self.batch, 1, 1),
                added_cond_kwargs=added,
                return_dict=False,
            )[0]

    def _loss(self, predicted_BCHW: torch.Tensor, target_BCHW: torch.Tensor) -> torch.Tensor:
        predicted, predicted_prior = predicted_BCHW.float().chunk(2)
        target, target_prior = target_BCHW.float().chunk(2)
        return F.mse_loss(predicted, target) + 1.0 * F.mse_loss(predicted_prior, target_prior)


@torch.no_grad()
def _encode_prompt(parts: Any, prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
    states, pooled_1P = [], None
    for tokenizer, encoder in (
        (parts.tokenizer, parts.text_encoder),
        (parts.tokenizer_2, parts.text_encoder_2),
    ):
        tokens_1L = tokenizer(
            [prompt],
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        output = encoder(tokens_1L.to(DEVICE), output_hidden_states=True)
        states.append(output.hidden_states[-2])
        pooled_1P = output[0]
    assert pooled_1P is not None
    return torch.cat(states, dim=-1), pooled_1P


def _read_pictures(folder: Path, side: int) -> list[torch.Tensor]:
    """(3, side, side) in -1..1 of each."""
    size = (side, side)
    pictures = [Image.open(path).convert("RGB").resize(size) for path in sorted(folder.iterdir())]
    return [framing.to_pixels(picture) for picture in pictures]


# Ours


class Ours:
    """Our module and batches, as a worker puts them together, under a plain Trainer."""

    def __init__(self, task: Task, batch: int, cache: bool, **train: Any):
        self.uri = storage.join(task.outputs, uuid.uuid4().hex)
        self.config = _configure(task, batch, cache, self.uri, train)
        compute = choose_precision("auto", DEVICE)
        model = load(self.config, DEVICE, compute)
        self.batches, self.module = build(self.config, model, compute)
        self.batches.fill_cache(0, 1)

    def run(self, num_steps: int, *callbacks: pl.Callback) -> list[float]:
        """Make steps; return when each was done."""
        clock = _Clock()
        trainer = pl.Trainer(
            accelerator="cpu" if DEVICE == "cpu" else "gpu",
            devices=1,
            callbacks=[*callbacks, clock],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            max_epochs=1,
        )
        first = self.module.step
        trainer.fit(self.module, train_dataloaders=_Steps(self.batches, first, first + num_steps))
        return clock.marks


class _Clock(pl.Callback):
    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.marks.append(time.perf_counter())


class _Steps:
    def __init__(self, batches: Batches, first: int, last: int):
        self._batches, self._range = batches, (first, last)

    def __len__(self) -> int:
        return self._range[1] - self._range[0]

    def __iter__(self) -> Iterator[list[Batch]]:
        return self._batches.steps(*self._range, 0, 1, None)


def _configure(
    task: Task, batch: int, cache: bool, uri: str, train: dict[str, Any]
) -> DreamBoothConfig:
    values = {
        "model": {"uri": task.model},
        "instance": {"uri": str(task.pictures / "instance"), "prompt": PROMPT},
        "prior": {"uri": str(task.pictures / "class"), "prompt": CLASS_PROMPT},
        "train": {
            "steps": 100_000,
            "global_batch_size": batch,
            "learning_rate": RATE,
            "resolution": task.side,
            **train,
        },
        "lora": {"rank": RANK},
        "run": {"name": "benchmark"},
        "output": {"uri": uri, "cache": cache},
    }
    return DreamBoothConfig.model_validate(values)


# The comparison


def compare(task: Task, batch: int, rounds: int, num_steps: int) -> dict[str, Any]:
    """Median seconds of a step of each side, timed by turns."""
    sides: dict[str, Script | Ours] = {
        "script": Script(task, batch),
        "no cache": Ours(task, batch, cache=False),
        "cache": Ours(task, batch, cache=True),
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            # One more than is timed: ours makes the next step's batch beside each that is.
            marks = side.run(WARM_UP + num_steps + 1)
            times[name] += np.diff(marks)[WARM_UP - 1 : -1].tolist()
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratios = {name: medians["script"] / medians[name] for name in WANTED}
    ratios["cache to no cache"] = medians["no cache"] / medians["cache"]
    facts = {"model": task.name, "side": task.side, "batch": batch}
    return {**facts, "step_s": medians, "ratios": ratios, "times": times}


def measure_steps(tasks: list[Task], batches: list[int], args: Any) -> list[dict[str, Any]]:
    print(f"{'seconds of a step':24}{'a script':>10}{'b no cache':>12}{'c cache':>10}", end="")
    print(f"{'a/b':>8}{'a/c':>8}{'b/c':>8}")
    table = []
    for task in tasks:
        for batch in batches:
            row = compare(task, batch, args.rounds, args.steps)
            table.append(row)
            step_s, ratios = row["step_s"], row["ratios"]
            name = f"{task.name}, {task.side} px, {batch}+{batch}"
            print(f"{name:24}{step_s['script']:10.4f}{step_s['no cache']:12.4f}", end="")
            print(f"{step_s['cache']:10.4f}", *(f"{r:7.2f}" for r in ratios.values()), flush=True)
    wanted = ", ".join(f"{name} {ratio}" for name, ratio in WANTED.items())
    print(f"wanted, as many times the script's steps per second: {wanted}")
    return table


# What checkpoints cost


def measure_stalls(task: Task, num_steps: int) -> list[dict[str, Any]]:
    """How long training waits for checkpoints, every 50 steps of a LoRA and of a whole UNet."""
    print(f"\n{'checkpoints every 50 steps':28}{'MB':>8}{'step s':>9}{'wall s':>9}", end="")
    print(f"{'stalled s':>11}{'share':>9}{'end s':>8}")
    table = []
    with places(Path(task.outputs)) as found:
        for method in ("lora", "full"):
            batch = _slow_enough(task, method)
            for place, uri in found.items():
                row = stall(task, method, batch, uri, num_steps)
                table.append({"model": task.name, "method": method, "place": place} | row)
                print(f"{f'{task.name} {method}, {place}':28}{row['bytes'] / 1e6:8.2f}", end="")
                print(f"{row['step_s']:9.3f}{row['wall_s']:9.1f}{row['stalled_s']:11.4f}", end="")
                print(f"{row['share']:9.3%}{row['end_s']:8.3f}", flush=True)
    return table


def stall(task: Task, method: str, batch: int, uri: str, num_steps: int) -> dict[str, Any]:
    """One run; the wait for the last checkpoint, when training is over, is told apart."""
    ours = Ours(task, batch, cache=True, method=method)
    saving = Saving(storage.join(uri, method), SAVE_EVERY, 2, 0)
    started = time.perf_counter()
    marks = ours.run(num_steps, saving, watch := _StallWatch(saving))
    wall_s = marks[-1] - started
    (latest,) = saving.checkpoints.list()[-1:]
    return {
        "batch": batch,
        "bytes": sum(entry["bytes"] for entry in latest.files.values()),
        "step_s": statistics.median(np.diff(marks).tolist()),
        "wall_s": wall_s,
        "stalled_s": watch.in_training_s,
        "share": watch.in_training_s / wall_s,
        "end_s": saving.stalled_s - watch.in_training_s,
    }


class _StallWatch(pl.Callback):
    """How long training had waited when its last step was done."""

    def __init__(self, saving: Saving):
        self._saving = saving
        self.in_training_s = 0.0

    def on_train_batch_end(self, *_: Any) -> None:
        self.in_training_s = self._saving.stalled_s


def _slow_enough(task: Task, method: str) -> int:
    """The least batch, of powers of two, whose step takes LEAST_STEP_S."""
    batch = 1
    while True:
        marks = Ours(task, batch, cache=True, method=method).run(5)
        if statistics.median(np.diff(marks).tolist()) >= LEAST_STEP_S:
            return batch
        batch *= 2


@contextmanager
def places(folder: Path) -> Iterator[dict[str, str]]:
    """Where checkpoints go: a folder, and a bucket for this benchmark where there is a server."""
    found = {"disk": str(folder / "checkpoints")}
    if "AWS_ENDPOINT_URL" not in os.environ:
        yield found
        return
    bucket, server = f"benchmark-{uuid.uuid4().hex[:12]}", fsspec.filesystem("s3")
    server.mkdir(bucket)
    try:
        yield found | {"s3": f"s3://{bucket}"}
    finally:
        server.invalidate_cache()
        server.rm(bucket, recursive=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8, help="that are timed in a round")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--stall-steps", type=int, default=120, help="0: not measured")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = [("starter", "starter", 64), ("narrow", str(build_narrow(folder / "narrow")), 128)]
        tasks = []
        for model, uri, side in models:
            draw_pictures(folder / model / "pictures", side)
            pictures, outputs = folder / model / "pictures", str(folder / model / "runs")
            tasks.append(Task(model, uri, side, pictures, outputs))
        facts = {**vars(args), "torch": torch.__version__, "device": DEVICE}
        found: dict[str, Any] = {"settings": facts | {"rank": RANK}}
        found["steps"] = measure_steps(tasks, args.batches, args)
        if args.stall_steps:
            found["stalls"] = measure_stalls(tasks[-1], args.stall_steps)
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
