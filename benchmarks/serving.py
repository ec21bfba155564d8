"""The serving application against diffusers' pipelines behind Ray Serve, under the same load.

`python -m benchmarks.serving [--models starter narrow] [--requests 40]` prints a table for each
model and writes benchmarks/serving.json. The sides: `a` is Ray's own example, one request at a
time; `b` has `@serve.batch`, and makes requests that agree in everything in one call; `keyed`, if
it is asked for, has such a queue for each key; `ours` is the application. All of them have the same
weights, dtype, threads, ingress and largest batch, and the same requests at the same moments: one
by one (Poisson) or in bursts, at so many times what `a` can do, which is measured first. Then a
number of callers who each wait for their answer load every side to saturation.

Each side runs alone, in a Ray cluster of its own, through all of its cells, since starting it takes
longer than a cell: ratios are of one run, but not of the same minute. What other jobs on the machine
disturb least is the CPU time of an image, all of the side's processes together. Threads that wait
do not spin, unless OMP_WAIT_POLICY says so. The client takes about a tenth of a core.
"""

import argparse
import io
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from ray.serve import Application

from benchmarks import load, rivals
from benchmarks.load import Answer, Wanted
from benchmarks.rivals import Setup
from benchmarks.tasks import SHAPES, build_random
from serve import app
from serve.config import ServeConfig

ROOT = Path(__file__).parents[1]
SIZES = {
    "starter": [(64, 64), (96, 64), (64, 96)],
    "narrow": [(128, 128), (128, 96), (96, 128)],
}
PATTERNS = ("poisson", "bursty")
NUM_WARM = 16
ALIKE = 2.0
"""Levels of 255 by which pictures of two sides may differ, on average over a picture."""
WANTED = "p50 0.5 and p99 0.7 of b's below saturation; images/s 1.3 of b's and 2 of a's at it"

# Of its own cluster whatever else runs on this machine; ended when its input is.
PROGRAM = """
import json, sys
import ray
from ray import serve as ray_serve
from benchmarks.rivals import Setup
from benchmarks.serving import application

side, setup, port = json.loads(sys.argv[1])
ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
ray_serve.start(http_options={"host": "127.0.0.1", "port": port})
ray_serve.run(application(side, Setup(**setup)), name="images")
print("ready", flush=True)
sys.stdin.read()
ray_serve.shutdown()
ray.shutdown()
"""


def application(side: str, setup: Setup) -> Application:
    """A side, for `serve run`."""
    if side != "ours":
        return rivals.build(side, setup)
    values = {
        "models": [{"name": "model", "uri": setup.uri}],
        # Nobody is refused: rivals have no bound either.
        "engine": {"max_rows": setup.rows, "max_pending_s": load.MOST_WAIT_S},
        "limits": {"max_deadline_s": load.MOST_WAIT_S},
        "scaling": {"num_cpus": setup.threads},
    }
    return app.build(ServeConfig.model_validate(values))


@dataclass
class Side:
    """A side that runs."""

    name: str
    url: str
    process: psutil.Process
    wanted: list[Wanted]
    pictures: dict[int, np.ndarray]
    """What each request looks like, as the first side made it."""

    def warm_up(self) -> None:
        load.play_closed(self.url, self.wanted[:NUM_WARM], NUM_WARM)

    def cell(self, moments: Sequence[float]) -> dict[str, Any]:
        """An open loop's numbers."""
        before_s = self._cpu_s()
        answers = load.play(self.url, self.wanted, moments, self.name == "ours")
        return self._told(answers, before_s)

    def closed(self, clients: int) -> dict[str, Any]:
        """A closed loop's."""
        before_s = self._cpu_s()
        answers = load.play_closed(self.url, self.wanted, clients)
        return self._told(answers, before_s)

    def _cpu_s(self) -> float:
        total = 0.0
        for process in [self.process, *self.process.children(recursive=True)]:
            try:
                times = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            total += times.user + times.system
        return total

    def _told(self, answers: list[Answer], before_s: float) -> dict[str, Any]:
        good = [answer for answer in answers if answer.status == 200]
        seconds = [answer.seconds for answer in good]
        firsts = [a.first_s for a in good if a.first_s and a.number % load.STREAMED_EVERY == 0]
        apart = [self._apart(answer) for answer in good]
        return {
            "side": self.name,
            "images_per_s": len(good) / max(answer.end_s for answer in answers),
            "p50_s": float(np.percentile(seconds, 50)),
            "p99_s": float(np.percentile(seconds, 99)),
            "first_p50_s": float(np.median(firsts)),
            "cpu_s": (self._cpu_s() - before_s) / len(good),
            "refused": sum(answer.status == 429 for answer in answers),
            "failed": sum(answer.status not in (200, 429) for answer in answers),
            "no_picture": sum(each is None for each in apart),
            "unlike": sum(each is not None and each > ALIKE for each in apart),
            "seconds": [round(answer.seconds, 3) for answer in answers],
        }

    def _apart(self, answer: Answer) -> float | None:
        """Levels between a picture and the first side's; None where there is none as asked for."""
        size = tuple(map(int, self.wanted[answer.number].values["size"].split("x")))
        try:
            picture = Image.open(io.BytesIO(answer.image)).convert("RGB")
        except OSError:
            return None
        if picture.size != size:
            return None
        pixels = np.asarray(picture).astype(np.float32)
        return float(np.abs(pixels - self.pictures.setdefault(answer.number, pixels)).mean())


@contextmanager
def running(side: str, setup: Setup) -> Generator[tuple[str, psutil.Process]]:
    """A side in processes of its own: its URL, and the process that started the others."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = int(taken.getsockname()[1])
    command = [sys.executable, "-c", PROGRAM, json.dumps([side, asdict(setup), port])]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_SERVE_LOG_TO_STDERR": "0"}
    environment.pop("RAY_ADDRESS", None)
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, stdin=-1, stdout=-1, stderr=log
        )
        try:
            assert process.stdout is not None
            if not any(line.strip() == "ready" for line in process.stdout):
                log.seek(0)
                raise RuntimeError(f"{side} did not start: {log.read()[-3000:]}")
            yield f"http://127.0.0.1:{port}", psutil.Process(process.pid)
        finally:
            process.communicate()


def measure(model: str, uri: str, args: argparse.Namespace) -> dict[str, Any]:
    """All cells of one model, side after side."""
    setup = Setup(uri, args.threads, args.rows, args.lend)
    wanted = load.draw_requests(args.requests, SIZES[model])
    pictures: dict[int, np.ndarray] = {}
    rows: list[dict[str, Any]] = []
    capacity = 0.0
    for name in args.sides:
        with running(name, setup) as (url, process):
            side = Side(name, url, process, wanted, pictures)
            side.warm_up()
            if not capacity:
                capacity = side.closed(1)["images_per_s"]
                print(f"\n{model}: {name} makes {capacity:.2f} images/s one by one", flush=True)
            for pattern in PATTERNS:
                for times in args.loads:
                    moments = load.arrivals(pattern, args.requests, times * capacity)
                    rows.append({"load": times, "pattern": pattern} | side.cell(moments))
                    show(rows[-1])
            saturated = {"load": None, "pattern": f"{args.clients} callers"}
            rows.append(saturated | side.closed(args.clients))
            show(rows[-1])
    return {"model": model, "capacity_per_s": capacity, "cells": rows}


def show(row: dict[str, Any]) -> None:
    """A line as soon as it is known: cells take a while."""
    print(f"{_cell(row):18}{row['side']:8}{row['images_per_s']:9.2f}{row['p50_s']:8.2f}", end="")
    print(f"{row['p99_s']:8.2f}{row['first_p50_s']:8.2f}{row['cpu_s']:8.2f}", end="")
    print(f"{row['refused']:6}{row['failed']:5}{row['no_picture']:5}{row['unlike']:5}", flush=True)


def compare(found: dict[str, Any], others: Sequence[str]) -> None:
    """Ours as many times the others', cell by cell; kept in `found`."""
    by_cell: dict[str, dict[str, dict[str, Any]]] = {}
    for row in found["cells"]:
        by_cell.setdefault(_cell(row), {})[row["side"]] = row
    names = {"p50": "p50_s", "p99": "p99_s", "1st": "first_p50_s", "img/s": "images_per_s"}
    print(f"{found['model']:18}", *(f"{f'{n}/{o}':>10}" for o in others for n in names))
    found["ratios"] = {}
    for cell, sides in by_cell.items():
        ratios = {
            f"{name}/{other}": sides["ours"][key] / sides[other][key]
            for other in others
            for name, key in names.items()
        }
        found["ratios"][cell] = ratios
        print(f"{cell:18}", *(f"{ratio:10.2f}" for ratio in ratios.values()), flush=True)


def _cell(row: dict[str, Any]) -> str:
    return row["pattern"] if row["load"] is None else f"{row['pattern']} {row['load']:g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", nargs="*", choices=SIZES, default=list(SIZES))
    parser.add_argument("--sides", nargs="*", default=["a", "b", "ours"], help="also: keyed")
    parser.add_argument("--requests", type=int, default=40, help="of a cell")
    parser.add_argument("--loads", type=float, nargs="*", default=[0.7, 0.95, 1.3])
    parser.add_argument("--clients", type=int, default=16, help="at saturation")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--lend", action="store_true", help="our kernels to the others")
    args = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # for the sides; nothing is computed here
    results = []
    print(f"{'':18}{'side':8}{'images/s':>9}{'p50 s':>8}{'p99 s':>8}{'first':>8}", end="")
    print(f"{'CPU s':>8}{'429':>6}{'err':>5}{'bad':>5}{'off':>5}")
    with tempfile.TemporaryDirectory() as folder:
        for model in args.models:
            shape = SHAPES.get(model)
            uri = "starter" if shape is None else build_random(Path(folder) / model, shape)
            results.append(measure(model, uri, args))
    print()
    for found in results:
        compare(found, [side for side in args.sides if side != "ours"])
    print(f"wanted: {WANTED}")
    facts = {**vars(args), "torch": torch.__version__, "cores": os.cpu_count()}
    out = {"settings": facts, "results": results}
    Path(__file__).with_suffix(".json").write_text(json.dumps(out, indent=2) + "\n")


if __name__ == "__main__":
    main()
