"""What a job costs beyond its engine: time of an image, and the driver's memory as shards grow.

`python -m benchmarks.job [--rounds 3] [--shards 1000 10000 100000]` prints two tables and writes
benchmarks/job.json. The first compares the bare engine with a worker without Ray and with a whole
job on Ray, turn by turn, from the first finished batch to the last one, so that no start counts.
The second runs whole jobs of one-pixel images, made by no engine, each in a process of its own.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray

from benchmarks.memory import Watch
from rayjobs.dataset.manifest import Manifest
from rayjobs.dataset.records import COLUMNS
from rayjobs.diffusion import weights
from rayjobs.generation import job
from rayjobs.generation.config import GenerateConfig
from rayjobs.generation.spec.records import Record
from rayjobs.generation.worker import shards as workers
from rayjobs.generation.worker.pool import session

MOST_MB = 200
PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de"
    "0000000c49444154789c636060600000000400015df2f1f10000000049454e44ae426082"
)
"""A PNG of one black pixel."""


# An image's time


def configure(args: argparse.Namespace, steps: int, shards: int, output: str) -> GenerateConfig:
    """A job whose shards are one batch each, and whose records agree in everything but the seed."""
    values: dict[str, Any] = {
        "model": {"uri": args.model},
        "prompts": {"inline": ["a photo of a red star on a blue background"]},
        "seeds": {"count": shards * args.batch},
        "sampler": {"name": "euler", "steps": steps, "guidance_scale": 5.0},
        "output": {"uri": output, "images_per_shard": args.batch},
        "engine": {"batch_size": args.batch},
    }
    if args.side is not None:
        values["image"] = {"width": args.side, "height": args.side}
    return GenerateConfig.model_validate(values)


class Sides:
    """The same images made by each side; a side tells the seconds of an image at steady state."""

    def __init__(self, args: argparse.Namespace, folder: str):
        self.args = args
        self.folder = folder
        self.shards = args.batches + 2
        self._round = 0
        self.steps = self._choose_steps()

    def bare(self, steps: int | None = None) -> dict[str, float]:
        """The engine of a worker, given the requests that the worker would give it."""
        made = self._worker("bare", steps or self.steps, lambda *_: None)
        records = [made.record(number) for number in range(made.segment.num_records)]
        requests = list(made.generator._requests(records, {}))
        marks = [_now() for _ in made.generator.engine.generate(requests)]
        return self._rate(marks[self.args.batch - 1 :: self.args.batch])

    def worker(self) -> dict[str, float]:
        marks: list[tuple[float, float]] = []
        made = self._worker("worker", self.steps, lambda *_: marks.append(_now()))
        assert len(list(made.make(range(self.shards)))) == self.shards
        return self._rate(marks[self.args.batch - 1 :: self.args.batch])

    def on_ray(self) -> dict[str, float]:
        config = self._config("ray", self.steps)
        job.run(config)
        return self._rate([(e["finished_at"], 0.0) for e in Manifest(config.output.uri).entries()])

    def _worker(
        self, name: str, steps: int, report: Callable[[int, int], None]
    ) -> workers.ShardWorker:
        config = self._config(name, steps)
        return workers.ShardWorker(config, job.prepare(config), report=report)

    def _config(self, name: str, steps: int) -> GenerateConfig:
        self._round += 1
        output = f"{self.folder}/{name}-{self._round}"
        return configure(self.args, steps, self.shards, output)

    def _rate(self, marks: list[tuple[float, float]]) -> dict[str, float]:
        """Seconds an image, on the clock and of all threads, from batch to batch.

        A worker hands a batch on when the next one is there, but not the last, which is left out.
        """
        marks = sorted(marks)[:-1]
        images = (len(marks) - 1) * self.args.batch
        wall_s, cpu_s = (marks[-1][n] - marks[0][n] for n in (0, 1))
        return {"wall_s": wall_s / images, "cpu_s": cpu_s / images}

    def _choose_steps(self) -> int:
        if self.args.steps is not None:
            return int(self.args.steps)
        return round(20 * self.args.image_s / self.bare(20)["wall_s"])


def _now() -> tuple[float, float]:
    """On the clock, and in CPU time of all threads of this process."""
    return time.time(), time.process_time()


def measure_overhead(args: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Rounds of each side by turns; ratios are taken within a round, then their median."""
    sides = Sides(args, folder)
    calls: dict[str, Callable[[], dict[str, float]]] = {
        "bare engine": sides.bare,
        "worker": sides.worker,
        "job on Ray": sides.on_ray,
    }
    rounds = [{name: call() for name, call in calls.items()} for _ in range(args.rounds)]
    print(f"\n{sides.steps} steps, batches of {args.batch}, {args.rounds} rounds of {args.batches}")
    print(f"{'side':14}{'s/image':>10}{'overhead':>10}{'CPU s/image':>13}{'overhead':>10}")
    table = []
    for name in calls:
        row: dict[str, Any] = {"side": name}
        for kind in ("wall_s", "cpu_s"):
            row[kind] = statistics.median(r[name][kind] for r in rounds)
            ratios = [r[name][kind] / r["bare engine"][kind] for r in rounds]
            row[f"{kind}_overhead_percent"] = 100 * (statistics.median(ratios) - 1)
        table.append(row)
        print(f"{name:14}{_told(row, 'wall_s', 10)}{_told(row, 'cpu_s', 13)}")
    return {"steps": sides.steps, "sides": table, "rounds": rounds}


def _told(row: dict[str, Any], kind: str, width: int) -> str:
    if not row[kind]:  # another process's time
        return ""
    return f"{row[kind]:{width}.4f}{row[f'{kind}_overhead_percent']:+9.2f}%"


# The driver's memory


class NoEngine:
    """Stands in for a worker's RecordGenerator: each record is one pixel, at once."""

    def __init__(self, config: GenerateConfig, model_name: str, guided: bool):
        self.model = SimpleNamespace(sha256=weights.locate(config.model.uri).sha256)
        self.engine = SimpleNamespace(num_steps=0, step_s=0.0, side_s=0.0)
        self.row = dict.fromkeys(COLUMNS) | {"width": 1, "height": 1, "status": "ok"}
        self.row |= {"image": {"bytes": PIXEL, "path": None}, "sampler": "none", "steps": 1}

    def generate(self, records: Iterable[Record]) -> Iterator[tuple[Record, dict[str, Any]]]:
        for record in records:
            own = {"record": record.number, "prompt": record.prompt, "seed": record.seed}
            yield record, self.row | own


def without_engine() -> None:
    """Runs in each process that Ray starts, before anything else."""
    workers.RecordGenerator = NoEngine  # ty: ignore[invalid-assignment]


def run_without_engine(num_shards: int, output: str) -> dict[str, Any]:
    """A whole job of `num_shards` shards of one pixel each; what it took of this process."""
    values: dict[str, Any] = {
        "model": {"uri": "starter"},
        "prompts": {"inline": ["a pixel"]},
        "seeds": {"count": num_shards},
        "output": {"uri": output, "images_per_shard": 1},
    }
    config = GenerateConfig.model_validate(values)
    hook = {"worker_process_setup_hook": without_engine}
    ray.init(address="local", include_dashboard=False, log_to_driver=False, runtime_env=hook)
    try:
        with session(config.workers):
            watch = Watch()
            summary = job.run(config)
    finally:
        ray.shutdown()
    assert (summary.num_made, summary.num_failed) == (num_shards, 0)
    found = {"shards": num_shards, "start_mb": watch.start_mb, "peak_mb": watch.peak_mb}
    return found | {"growth_mb": watch.peak_mb - watch.start_mb, "seconds": summary.seconds}


def measure_memory(shards: list[int], folder: str) -> list[dict[str, Any]]:
    print(
        f"\n{'shards':>8}{'start MB':>10}{'peak MB':>9}{'growth':>8}{'shards/s':>10}{'within':>8}"
    )
    table = []
    for number in shards:
        output = f"{folder}/{number}-shards"
        command = [sys.executable, "-m", "benchmarks.job", "--alone", str(number), output]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
        row = json.loads(done.stdout.splitlines()[-1])
        table.append(row)
        print(
            f"{number:8}{row['start_mb']:10.0f}{row['peak_mb']:9.0f}{row['growth_mb']:8.1f}"
            f"{number / row['seconds']:10.0f}{'yes' if row['growth_mb'] <= MOST_MB else 'NO':>8}",
            flush=True,
        )
    for before, row in itertools.pairwise(table):
        more_mb = row["growth_mb"] - before["growth_mb"]
        each = more_mb / (row["shards"] - before["shards"]) * 1e6
        row["growth_per_shard_bytes"] = each
        print(f"from {before['shards']} to {row['shards']} shards: {each:,.0f} bytes a shard")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="starter")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--batches", type=int, default=6, help="that are timed in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="else as many as --image-s needs")
    parser.add_argument("--image-s", type=float, default=0.55, help="seconds of an image")
    parser.add_argument("--side", type=int, help="pixels; else the model's own")
    parser.add_argument("--shards", type=int, nargs="*", default=[1_000, 10_000, 100_000])
    parser.add_argument("--folder", help="of the data sets made; else a temporary one")
    parser.add_argument("--alone", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        print(json.dumps(run_without_engine(int(args.alone[0]), args.alone[1])))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        found: dict[str, Any] = {"settings": vars(args)}
        if args.rounds:
            found["overhead"] = measure_overhead(args, folder)
        if args.shards:
            found["memory"] = measure_memory(args.shards, folder)
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
