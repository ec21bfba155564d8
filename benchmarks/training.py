"""A training step against the step of diffusers' own script: same model, pictures and threads.

`python -m benchmarks.training [--rounds 4] [--steps 8]` prints two tables and writes
benchmarks/training.json. The first has the seconds of one optimizer step of a LoRA with prior
preservation: of the script, of ours without caches, and of ours with them. Rounds alternate between
the three and the ratios are of medians, for machines are noisy; beside the clock's there are the
CPU seconds of all threads, which other jobs on the machine disturb less. For their sake threads
that wait do not spin either, unless OMP_WAIT_POLICY says so. The second has the share of a run's
time in which training waits for checkpoints, on this machine's disk and, where AWS_ENDPOINT_URL
names a server, on S3. One device and no Ray: CUDA in bf16 where there is one, else the CPU in fp32.
"""

import argparse
import json
import logging
import os
import sys
import tempfile
import uuid
import warnings
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytorch_lightning as pl
import torch

from benchmarks.script_step import Script
from benchmarks.tasks import CLASS_PROMPT, DEVICE, PROMPT, RANK, RATE, Marks, Task, prepare
from rayjobs import storage
from rayjobs.dreambooth.config import CheckpointConfig, DreamBoothConfig, OutputConfig
from rayjobs.dreambooth.data.photos import find_photos
from rayjobs.dreambooth.resolved import ResolvedRun, resolve
from rayjobs.dreambooth.training.batches import Batch, Batches
from rayjobs.dreambooth.training.callback import CheckpointCallback
from rayjobs.dreambooth.training.worker import build, choose_precision, load

WARM_UP = 2
LEAST_STEP_S = 0.2
"""Of a step beside which checkpoints are timed."""
SAVE_EVERY = 50
WANTED = {"no cache": 1.0, "cache": 1.3}
"""How many times the script's steps per second ours are to make."""


# Ours


class Ours:
    """Our module and batches, as a worker puts them together, under a plain Trainer."""

    def __init__(self, task: Task, batch: int, cache: bool, **train: Any):
        self.uri = storage.join(task.outputs, uuid.uuid4().hex)
        self.resolved = _resolve(_configure(task, batch, cache, self.uri, train))
        compute = choose_precision("auto", DEVICE)
        model = load(self.resolved.config, DEVICE, compute)
        self.batches, self.module = build(self.resolved, model, compute)
        self.batches.fill_cache(0, 1)

    def run(self, num_steps: int, *callbacks: pl.Callback) -> np.ndarray:
        """Make steps; return the seconds of all but the first."""
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
        return clock.marks.seconds()


class _Clock(pl.Callback):
    def __init__(self) -> None:
        self.marks = Marks()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.marks.add()


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


def _resolve(config: DreamBoothConfig) -> ResolvedRun:
    images = find_photos(str(config.prior.uri), str(config.prior.prompt))
    run = resolve(config)
    return run.with_class_images({run.class_images_uri: images})


# The comparison


def compare(task: Task, batch: int, rounds: int, num_steps: int) -> dict[str, Any]:
    """Median seconds of a step of each side, timed by turns."""
    script = Script(task, batch)
    sides: dict[str, Script | Ours] = {
        "script": script,
        "no cache": Ours(task, batch, cache=False),
        "cache": Ours(task, batch, cache=True),
    }
    times: dict[str, list[np.ndarray]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            # One more than is timed: on a GPU ours makes the next step's batch beside each that is.
            times[name].append(side.run(WARM_UP + num_steps + 1)[WARM_UP - 1 : -1])
    row: dict[str, Any] = {"model": task.name, "side": task.side, "batch": batch}
    for number, kind in enumerate(("wall", "cpu")):
        each = {name: np.concatenate(values)[:, number] for name, values in times.items()}
        medians = {name: float(np.median(values)) for name, values in each.items()}
        ratios = {name: medians["script"] / medians[name] for name in WANTED}
        ratios["cache to no cache"] = medians["no cache"] / medians["cache"]
        encoding_s = float(np.median(script.encoding.seconds()[::2, number]))
        ratios["nothing to encode"] = medians["script"] / (medians["script"] - encoding_s)
        row[kind] = {"step_s": medians, "ratios": ratios}
    return row


def measure_steps(tasks: list[Task], args: argparse.Namespace) -> list[dict[str, Any]]:
    print(f"{'seconds of a step':30}{'a script':>10}{'b no cache':>12}{'c cache':>10}", end="")
    print(f"{'a/b':>8}{'a/c':>8}{'b/c':>8}{'a/a*':>8}")
    table = []
    for task in tasks:
        for batch in args.batches:
            row = compare(task, batch, args.rounds, args.steps)
            table.append(row)
            for kind in ("wall", "cpu"):
                step_s, ratios = row[kind]["step_s"], row[kind]["ratios"]
                name = f"{task.name}, {task.side} px, {batch}+{batch}, {kind}"
                print(f"{name:30}{step_s['script']:10.4f}{step_s['no cache']:12.4f}", end="")
                print(f"{step_s['cache']:10.4f}", *(f"{r:7.2f}" for r in ratios.values()))
    wanted = ", ".join(f"{name} {ratio}" for name, ratio in WANTED.items())
    print(f"wanted, as many times the script's steps per second: {wanted}")
    print("a*: the script less its autoencoder, which is all that caches spare", flush=True)
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
    changed = {
        "output": OutputConfig(uri=storage.join(uri, method)),
        "checkpoint": CheckpointConfig(every_n_steps=SAVE_EVERY),
    }
    resolved = replace(ours.resolved, config=ours.resolved.config.model_copy(update=changed))
    saving = CheckpointCallback(resolved, 0, 1, False, "benchmark")
    steps_s = ours.run(num_steps, saving, watch := _StallWatch(saving))[:, 0]
    wall_s = float(steps_s.sum())
    (latest,) = saving.checkpoints.list()[-1:]
    return {
        "batch": batch,
        "bytes": sum(entry["bytes"] for entry in latest.files.values()),
        "step_s": float(np.median(steps_s)),
        "wall_s": wall_s,
        "stalled_s": watch.in_training_s,
        "share": watch.in_training_s / wall_s,
        "end_s": saving.stalled_s - watch.in_training_s,
    }


class _StallWatch(pl.Callback):
    """How long training had waited when its last step was done."""

    def __init__(self, saving: CheckpointCallback):
        self._saving = saving
        self.in_training_s = 0.0

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.in_training_s = self._saving.stalled_s


def _slow_enough(task: Task, method: str) -> int:
    """The least batch, of powers of two, whose step takes LEAST_STEP_S."""
    batch = 1
    while True:
        steps_s = Ours(task, batch, cache=True, method=method).run(6)[1:, 0]
        if steps_s.min() >= LEAST_STEP_S:
            return batch
        batch *= 2


@contextmanager
def places(folder: Path) -> Generator[dict[str, str]]:
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
    parser.add_argument("--models", nargs="*", default=["starter", "narrow"])
    parser.add_argument("--side", type=int, default=256, help="pixels; the starter's are 64")
    parser.add_argument("--stall-model", default="narrow", help="one of --models")
    parser.add_argument("--stall-steps", type=int, default=120, help="0: not measured")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if "OMP_WAIT_POLICY" not in os.environ:  # read once, when torch is loaded
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.training", *sys.argv[1:]])
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as name:
        tasks = {model: prepare(Path(name) / model, model, args.side) for model in args.models}
        facts = {**vars(args), "torch": torch.__version__, "device": DEVICE}
        facts["OMP_WAIT_POLICY"] = os.environ["OMP_WAIT_POLICY"]
        found: dict[str, Any] = {"settings": facts | {"rank": RANK}}
        found["steps"] = measure_steps(list(tasks.values()), args)
        if args.stall_steps:
            found["stalls"] = measure_stalls(tasks[args.stall_model], args.stall_steps)
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
