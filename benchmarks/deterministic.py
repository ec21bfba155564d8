"""Whether served pictures are a job's own, bit by bit whatever the load, and what that costs.

`python -m benchmarks.deterministic [--pictures 200]` makes mixed pictures by `rayjobs generate`
(every sampler, sizes, steps, guidance, image-to-image, weighted and long prompts, adapters, rows
that leave calls out, schedules of their own), then asks a `python -m serve run` with
`engine.deterministic` for the same ones in random order, many at once, beside callers who keep some
rows taken all the time. Their pixels are compared hash by hash. Then `--timed` of the same requests
are played without those callers, with and without the key, which says what it costs. With
`--folder` pictures that jobs have made are kept for the next run. Writes
benchmarks/deterministic.json.
"""

import argparse
import hashlib
import io
import itertools
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import eq
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml
from PIL import Image

from benchmarks import load
from benchmarks.adapters import write_adapter
from benchmarks.load import Answer, Wanted
from benchmarks.serving import free_port
from rayjobs.dataset.manifest import Manifest
from rayjobs.diffusion.model import load_model
from rayjobs.diffusion.sampler_names import SAMPLERS
from rayjobs.starter import world

NAMES = [name for name in SAMPLERS if not name.startswith("edm_")]
SIZES = [(64, 64), (64, 64), (96, 64), (48, 80)]
STEPS = (3, 4, 6, 9)
GUIDANCE = (1.0, 3.0, 5.0, 7.5)
LORAS = {"first": 0.8, "second": -0.5}
SCHEDULE = [999, 730, 443, 193, 53]
LONG = "a photo of a (red:1.3) star on a [blue] background, " * 5
KINDS = {"plain": 14, "first": 2, "second": 2, "schedule": 2}
"""Jobs, and how many of 20 pictures each makes: what is a job's own varies from one to the next."""
TAKEN: dict[str, Any] = {"prompt": "a photo of a red star", "num_inference_steps": 120}
"""What callers ask for who keep rows taken."""


@dataclass(frozen=True)
class Picture:
    """One to make: `settings` are a job's columns; `init` is a PNG."""

    kind: str
    settings: dict[str, Any]
    init: bytes | None

    def wanted(self, number: int) -> Wanted:
        """The same as a request to the server."""
        names = {"steps": "num_inference_steps"}
        values = {
            names.get(k, k): v for k, v in self.settings.items() if k not in ("width", "height")
        }
        values["size"] = "{width}x{height}".format(**self.settings)
        if self.kind in LORAS:
            values["loras"] = [{"name": self.kind, "scale": LORAS[self.kind]}]
        if self.kind == "schedule":
            values["timesteps"] = SCHEDULE
        return Wanted(number, values, self.init)


def draw_pictures(count: int) -> list[Picture]:
    """The same ones each time."""
    rng, shapes = random.Random(0), np.random.default_rng(0)
    kinds = list(itertools.chain.from_iterable([kind] * num for kind, num in KINDS.items()))
    made = []
    for number in range(count):
        kind = kinds[number % len(kinds)]
        width, height = rng.choice(SIZES)
        scene = world.random_scene(shapes)
        own: dict[str, Any] = {"prompt": world.caption(scene), "seed": rng.randrange(2**31)}
        own |= {"width": width, "height": height, "guidance_scale": rng.choice(GUIDANCE)}
        own["sampler"] = "euler" if kind == "schedule" else NAMES[number % len(NAMES)]
        if kind != "schedule":
            own["steps"] = rng.choice(STEPS)
        if rng.random() < 0.3:
            own |= {"prompt": LONG, "prompt_syntax": "a1111"}
        if rng.random() < 0.4:
            own["negative_prompt"] = rng.choice(["", "a blue ring"])
        if rng.random() < 0.2:
            own["guidance_rescale"] = 0.5
        if rng.random() < 0.25:
            own["guidance_interval"] = rng.choice([[0.0, 0.5], [0.2, 0.8]])
        if rng.random() < 0.25:
            own["cache_interval"] = rng.choice([2, 3])
        init = None
        if rng.random() < 0.3 and own["sampler"] != "ipndm":
            own["strength"] = rng.choice([0.4, 0.6, 1.0])
            side = rng.choice([64, 96, 120])
            init = _png(world.draw(scene, shapes, side)[: side - 8 * (number % 3)])
        made.append(Picture(kind, own, init))
    return made


def _png(pixels: np.ndarray) -> bytes:
    Image.fromarray(pixels).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def digest(picture: bytes) -> str:
    """Of a picture's pixels: the files differ in what they say beside them."""
    return hashlib.sha256(Image.open(io.BytesIO(picture)).convert("RGB").tobytes()).hexdigest()


# The jobs


def make(folder: Path, pictures: Sequence[Picture], args: argparse.Namespace) -> list[str]:
    """The hash of each picture, or why there is none, as jobs make them."""
    found: dict[int, str] = {}
    for kind in KINDS:
        numbers = [n for n, picture in enumerate(pictures) if picture.kind == kind]
        job = folder / f"{kind}.yaml"
        job.write_text(yaml.safe_dump(_job(folder, kind, [pictures[n] for n in numbers], args)))
        subprocess.run([sys.executable, "-m", "rayjobs", "generate", str(job)], check=True)
        manifest = Manifest(str(folder / kind))
        for entry in manifest.entries():
            for row in manifest.format.read(manifest.data, entry["shard"]):
                data = (row["image"] or {}).get("bytes")
                found[numbers[row["record"]]] = digest(data) if data else f"none: {row['error']}"
    return [found[number] for number in range(len(pictures))]


def _job(
    folder: Path, kind: str, pictures: Sequence[Picture], args: argparse.Namespace
) -> dict[str, Any]:
    prompts = folder / f"{kind}.jsonl"
    lines = []
    for number, picture in enumerate(pictures):
        row = dict(picture.settings)
        if picture.init is not None:
            row["init_image"] = f"{kind}-{number}.png"
            (folder / row["init_image"]).write_bytes(picture.init)
        lines.append(json.dumps(row) + "\n")
    prompts.write_text("".join(lines))
    model: dict[str, Any] = {"uri": args.model}
    if kind in LORAS:
        model["loras"] = [{"uri": str(folder / f"{kind}.safetensors"), "scale": LORAS[kind]}]
    sampler = {"name": "euler", "timesteps": SCHEDULE} if kind == "schedule" else {}
    return {
        "model": model,
        "prompts": {"uri": str(prompts)},
        "sampler": sampler,
        "output": {"uri": str(folder / kind)},
        "engine": {"batch_size": args.rows},
        "workers": {"num_cpus": 1},
    }


# The server


@contextmanager
def serving(
    folder: Path, args: argparse.Namespace, *, deterministic: bool
) -> Generator[tuple[str, psutil.Process]]:
    """A server's address and its process."""
    port = free_port()
    values = {
        "models": [{"name": "model", "uri": args.model}],
        "loras": [{"name": name, "uri": str(folder / f"{name}.safetensors")} for name in LORAS],
        "engine": {
            "max_rows": args.rows,
            "deterministic": deterministic,
            "max_pending_s": load.MAX_WAIT_S,
        },
        "limits": {"max_deadline_s": load.MAX_WAIT_S},
        "scaling": {"num_cpus": 1},
    }
    app = {"name": "images", "import_path": "serve.app:build", "args": values}
    file = folder / "serve.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "http_options": {"host": "127.0.0.1", "port": port},
                "applications": [{**app, "route_prefix": "/"}],
            }
        )
    )
    command = [sys.executable, "-m", "serve", "run", str(file)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        if not any(line.startswith("ready") for line in process.stdout):
            raise RuntimeError("the server did not start")
        yield f"http://127.0.0.1:{port}", psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()


@contextmanager
def taking(url: str, rows: int) -> Generator[None]:
    """So many of the server's rows are others' all the time."""
    over = threading.Event()

    def asked() -> Iterator[Wanted]:
        for number in itertools.count():
            if over.is_set():
                return
            yield Wanted(number, {**TAKEN, "seed": number}, None)

    thread = threading.Thread(target=load.play_closed, args=(url, asked(), rows))
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def ask(url: str, pictures: Sequence[Picture], clients: int, seed: int) -> list[Answer]:
    """An answer for each picture, in their order; asked for in a random one."""
    wanted = [picture.wanted(number) for number, picture in enumerate(pictures)]
    random.Random(seed).shuffle(wanted)
    return load.play_closed(url, wanted, clients)


def hashes(answers: Sequence[Answer]) -> list[str]:
    return [digest(each.image) if each.image else f"none: {each.status}" for each in answers]


def cost(
    server: tuple[str, psutil.Process], pictures: Sequence[Picture], clients: int
) -> dict[str, Any]:
    """What the pictures take without other load."""
    url, process = server
    busy_s, started_s = _cpu_s(process), time.monotonic()
    answers = ask(url, pictures, clients, 1)
    seconds = time.monotonic() - started_s
    spent_s = (_cpu_s(process) - busy_s) / len(pictures)
    return {
        "images_per_s": len(pictures) / seconds,
        "cpu_s_per_image": spent_s,
        "hashes": hashes(answers),
    }


def _cpu_s(process: psutil.Process) -> float:
    """Of the replicas that hold models."""
    spent_s = 0.0
    for each in process.children(recursive=True):
        try:
            if "".join(each.cmdline()).startswith("ray::ServeReplica:images:Engine"):
                spent_s += sum(each.cpu_times()[:2])
        except psutil.NoSuchProcess:
            continue
    return spent_s


def differing(
    pictures: Sequence[Picture], expected: Sequence[str], found: Sequence[str]
) -> list[Mapping[str, Any]]:
    """The requests whose picture is another, or missing."""
    three = zip(pictures, expected, found, strict=True)
    return [
        {"kind": p.kind, **p.settings, "edits": p.init is not None, "job": a, "served": b}
        for p, a, b in three
        if a != b or a.startswith("none")
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="starter")
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--rows", type=int, default=8, help="of a call")
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--timed", type=int, default=64, help="pictures of which the cost is told")
    parser.add_argument("--taken", type=int, default=2, help="rows that others keep")
    parser.add_argument("--folder", type=Path, help="where jobs' pictures are kept")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        results = measure(args.folder or Path(temporary), args)
    facts = {key: str(value) for key, value in vars(args).items()}
    out = Path(__file__).with_suffix(".json")
    out.write_text(json.dumps({"settings": facts, **results}, indent=2) + "\n")


def measure(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    model = load_model(args.model)
    for number, name in enumerate(LORAS):
        Path(write_adapter(model, folder, number, 4)).rename(folder / f"{name}.safetensors")
    pictures = draw_pictures(args.pictures)
    expected = make(folder, pictures, args)
    costs, timed = dict[str, Any](), pictures[: args.timed]
    with serving(folder, args, deterministic=True) as server:
        with taking(server[0], args.taken):
            found = hashes(ask(server[0], pictures, args.clients, 0))
        wrong = differing(pictures, expected, found)
        equal = len(pictures) - len(wrong)
        print(f"{equal} of {len(pictures)} served pictures are the job's own bits", flush=True)
        for each in wrong[:20]:
            print(json.dumps(each), flush=True)
        costs["deterministic"] = cost(server, timed, args.clients)
    with serving(folder, args, deterministic=False) as server:
        costs["as needed"] = cost(server, timed, args.clients)
    print(f"\n{'calls':16}{'images/s':>10}{'CPU s/image':>13}{f'equal of {len(timed)}':>14}")
    for name, row in costs.items():
        row["equal"] = sum(map(eq, expected, row.pop("hashes")))
        print(
            f"{name:16}{row['images_per_s']:10.2f}{row['cpu_s_per_image']:13.2f}{row['equal']:14}"
        )
    return {"equal": equal, "differing": wrong, "costs": costs}


if __name__ == "__main__":
    main()
