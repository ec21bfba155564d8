"""The serving application against diffusers' pipelines behind Ray Serve, under the same load.

`python -m benchmarks.serving [--models starter narrow] [--requests 30]` prints a table for each
model and writes benchmarks/serving.json. The sides: `a` is Ray's own example, one request at a
time; `b` has `@serve.batch`, and makes requests that agree in everything in one call; `keyed`, if
it is asked for, has such a queue for each key; `ours` is the application. All of them have the same
weights, dtype, threads and largest batch, and the same requests at the same moments: one by one
(Poisson) or in bursts, at so many times what the first side can do, which is measured before each
load. Then a number of callers who each wait for their answer load every side to saturation.

The sides are applications of one Ray cluster and take turns, cell by cell, so that a ratio is of
the same minutes; one that is not asked takes two hundredths of a core. Columns: `first` is the
median time until there is anything to look at, a partial image where a side has such; CPU s is that
of the side's own processes for each image; 429, err, bad (no picture as asked for) and off (not the
picture that the first side made) are counts; `others` says how many cores other jobs took of the
machine meanwhile. Where that is not near 0, or differs between sides, times are to be read with
care, and CPU s says more. Below them stands ours as many times each rival's. Threads that wait do
not spin, unless OMP_WAIT_POLICY says so.
"""

import argparse
import io
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
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
PATTERNS, SATURATED = ("poisson", "bursty"), "saturated"
NUM_WARM = 16
ALIKE = 2.0
"""Levels of 255 by which pictures of two sides may differ, on average over a picture."""
TARGETS = "p50 0.5 and p99 0.7 of b's below saturation; images/s 1.3 of b's and 2 of a's at it"

# Of its own cluster whatever else runs on this machine; ended when its input is.
PROGRAM = """
import json, sys
import ray
from ray import serve as ray_serve
from benchmarks.rivals import Setup
from benchmarks.serving import application

sides, setup, port = json.loads(sys.argv[1])
ray.init(address="local", num_cpus=32, include_dashboard=False, log_to_driver=False)
ray_serve.start(http_options={"host": "127.0.0.1", "port": port})
for side, prefix in sides.items():
    ray_serve.run(application(side, Setup(**setup)), name=side, route_prefix=prefix or "/")
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
        "engine": {"max_rows": setup.rows, "max_pending_s": setup.pending_s},
        "limits": {"max_deadline_s": load.MAX_WAIT_S},
        "scaling": {"num_cpus": setup.threads},
    }
    return app.build(ServeConfig.model_validate(values))


class Watch:
    """CPU time used while a cell runs: by a side, and by processes outside this benchmark."""

    def __init__(self, side: str, cluster: psutil.Process):
        self.cluster = cluster
        self.title = f"ray::ServeReplica:{side}:"
        self.before = self._now()

    def usage(self) -> dict[str, float]:
        """CPU seconds of the side's replicas, and how many cores other processes used."""
        clock, busy, own, every = (
            now - before for now, before in zip(self._now(), self.before, strict=True)
        )
        return {"cpu_s": own, "others": max(0.0, busy - every) / clock}

    def _now(self) -> tuple[float, float, float, float]:
        """Seconds: the clock's, and of CPU time the machine's, the side's, the benchmark's."""
        machine = psutil.cpu_times()
        busy_s = sum(machine) - machine.idle - machine.iowait - machine.guest
        own_s, every_s = 0.0, time.process_time()
        for process in [self.cluster, *self.cluster.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                spent_s = sum(process.cpu_times()[:2])
                every_s += spent_s
                own_s += spent_s if "".join(process.cmdline()).startswith(self.title) else 0.0
        return time.monotonic(), busy_s, own_s, every_s


@dataclass
class Side:
    """A side that runs."""

    name: str
    url: str
    wanted: list[Wanted]
    pictures: dict[int, np.ndarray]
    """The first side's image of each request; shared by all sides."""
    cluster: psutil.Process
    """The process that started all others."""

    def warm_up(self) -> None:
        load.play_closed(self.url, self.wanted[:NUM_WARM], NUM_WARM)

    def cell(self, moments: Sequence[float]) -> dict[str, Any]:
        """An open loop's numbers."""
        watch = Watch(self.name, self.cluster)
        answers = load.play(self.url, self.wanted, moments, self.name == "ours")
        return self._summarize(answers, watch.usage())

    def closed(self, clients: int) -> dict[str, Any]:
        """A closed loop's."""
        watch = Watch(self.name, self.cluster)
        answers = load.play_closed(self.url, self.wanted, clients)
        return self._summarize(answers, watch.usage())

    def alone_s(self) -> float:
        """Seconds of the first requests, one by one, without other load."""
        return sum(each.seconds for each in load.play_closed(self.url, self.wanted[:NUM_WARM], 1))

    def _summarize(self, answers: list[Answer], used: dict[str, float]) -> dict[str, Any]:
        good = [answer for answer in answers if answer.status == 200]
        if not good:
            statuses = {answer.status for answer in answers}
            raise RuntimeError(f"no request to {self.name} succeeded; statuses: {statuses}")
        seconds = [answer.seconds for answer in good]
        firsts = [a.first_s for a in good if a.first_s and a.number % load.STREAMED_EVERY == 0]
        apart = [self._apart(answer) for answer in good]
        return {
            "side": self.name,
            "images_per_s": len(good) / max(answer.end_s for answer in answers),
            "p50_s": float(np.percentile(seconds, 50)),
            "p99_s": float(np.percentile(seconds, 99)),
            "first_p50_s": float(np.median(firsts)),
            "cpu_s": used["cpu_s"] / len(good),
            "others": used["others"],
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


def free_port() -> int:
    """One of this machine that nobody listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@contextmanager
def running(names: Sequence[str], setup: Setup) -> Generator[tuple[dict[str, str], psutil.Process]]:
    """All sides in a cluster of their own: their URLs, and the process that started the others."""
    port = free_port()
    # Ours has its whole paths in its routes: it knows no prefix.
    prefixes = {name: "" if name == "ours" else f"/{name}" for name in names}
    command = [sys.executable, "-c", PROGRAM, json.dumps([prefixes, asdict(setup), port])]
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
                raise RuntimeError(f"the sides did not start: {log.read()[-3000:]}")
            urls = {n: f"http://127.0.0.1:{port}{prefix}" for n, prefix in prefixes.items()}
            yield urls, psutil.Process(process.pid)
        finally:
            process.communicate()


def measure(model: str, uri: str, args: argparse.Namespace) -> dict[str, Any]:
    """All cells of one model, the sides by turns."""
    setup = Setup(uri, args.threads, args.rows, args.lend)
    wanted = load.draw_requests(args.requests, SIZES[model])
    pictures: dict[int, np.ndarray] = {}
    rows: list[dict[str, Any]] = []

    def turns(cell: dict[str, Any], run: Callable[[Side], dict[str, Any]]) -> None:
        for side in sides:
            rows.append(cell | run(side))
            show(rows[-1])
        sides.append(sides.pop(0))  # another one begins the next cell

    with running(args.sides, setup) as (urls, cluster):
        sides = [Side(name, url, wanted, pictures, cluster) for name, url in urls.items()]
        for side in sides:
            side.warm_up()
        first, alone = sides[0], sides[0].closed(1)
        capacity, usual_s = alone["images_per_s"], sum(alone["seconds"][:NUM_WARM])
        print(f"\n{model}: {first.name} makes {capacity:.2f} images/s one by one", flush=True)
        for pattern in PATTERNS:
            for times in args.loads:
                # The machine is not as fast at all times, and the load is to be what it is called.
                speed = usual_s / first.alone_s()
                moments = load.arrivals(pattern, args.requests, times * capacity * speed)
                cell = {"load": times, "pattern": pattern, "speed": speed}
                turns(cell, lambda side, moments=moments: side.cell(moments))
        turns({"load": None, "pattern": SATURATED}, lambda side: side.closed(args.clients))
    return {"model": model, "capacity_per_s": capacity, "alone": alone, "cells": rows}


def show(row: dict[str, Any]) -> None:
    """A line as soon as it is known: cells take a while."""
    print(f"{_cell(row):18}{row['side']:8}{row['images_per_s']:9.2f}{row['p50_s']:8.2f}", end="")
    print(f"{row['p99_s']:8.2f}{row['first_p50_s']:8.2f}{row['cpu_s']:8.2f}", end="")
    print(f"{row['refused']:6}{row['failed']:5}{row['no_picture']:5}{row['unlike']:5}", end="")
    print(f"{row['others']:8.2f}", flush=True)


def compare(found: dict[str, Any], others: Sequence[str]) -> None:
    """Ours as many times the others', cell by cell; kept in `found`."""
    by_cell: dict[str, dict[str, dict[str, Any]]] = {}
    for row in found["cells"]:
        by_cell.setdefault(_cell(row), {})[row["side"]] = row
    names = {"p50": "p50_s", "p99": "p99_s", "1st": "first_p50_s", "img/s": "images_per_s"}
    names["CPU"] = "cpu_s"
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
    parser.add_argument("--sides", nargs="*", default=["a", "b", "ours"], help="or keyed")
    parser.add_argument("--requests", type=int, default=30, help="of a cell; p99 is of them")
    parser.add_argument("--loads", type=float, nargs="*", default=[0.7, 0.95, 1.3])
    parser.add_argument("--clients", type=int, default=16, help="at saturation")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--lend", action="store_true", help="our kernels to the others")
    args = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # for the sides; nothing is computed here
    results = []
    print(f"{'':18}{'side':8}{'images/s':>9}{'p50 s':>8}{'p99 s':>8}{'first':>8}", end="")
    print(f"{'CPU s':>8}{'429':>6}{'err':>5}{'bad':>5}{'off':>5}{'others':>8}")
    with tempfile.TemporaryDirectory() as folder:
        for model in args.models:
            shape = SHAPES.get(model)
            uri = "starter" if shape is None else build_random(Path(folder) / model, shape)
            results.append(measure(model, uri, args))
    print()
    for found in results:
        compare(found, [side for side in args.sides if side != "ours"])
    print(f"targets: {TARGETS}")
    facts = {**vars(args), "torch": torch.__version__, "cores": os.cpu_count()}
    out = {"settings": facts, "results": results}
    Path(__file__).with_suffix(".json").write_text(json.dumps(out, indent=2) + "\n")


if __name__ == "__main__":
    main()
