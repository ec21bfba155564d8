"""What rows gain that leave guidance and the UNet's deep blocks out at times, and what it costs.

`python -m benchmarks.economy [--model starter] [--pictures 96]` draws the same pictures (seeds 0,
1, 2, ..., Euler, 30 steps, guidance 4) with each guidance interval and each cache interval, and
prints the processor's seconds and the UNet's work against those of plain ones, how far the pictures
are from these (PSNR) and which share of them shows what its prompt says. Work is counted, so that
no other load of the machine moves it: calls of all blocks, and of the outermost ones as a part of
one. Then plain rows and thrifty ones share their calls: the bits of either must not move. Writes
benchmarks/economy.json.
"""

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.adherence import left_out_scenes, random_scenes
from rayjobs.diffusion.economy.plan import REUSE_COST
from rayjobs.diffusion.engine import Engine
from rayjobs.diffusion.model import Model, load_model
from rayjobs.diffusion.request import Request
from rayjobs.starter import checker, world

GUIDANCE = (None, (0.0, 0.5), (0.2, 0.8))
CACHE = (1, 2, 3, 5)
THRIFTY: dict[str, Any] = {"guidance_interval": (0.0, 0.5), "cache_interval": 3}
"""What shares calls with plain rows."""
MAX_PSNR = 99.0
"""Of equal pictures."""


def plain_requests(scenes: Sequence[world.Scene]) -> list[Request]:
    return [
        Request(prompt=world.caption(scene), seed=n, sampler="euler", steps=30, guidance_scale=4.0)
        for n, scene in enumerate(scenes)
    ]


def draw(model: Model, requests: Sequence[Request]) -> tuple[list[np.ndarray], float, float]:
    """A picture for each, in their order, and the processor's seconds and the work for all."""
    engine, work = Engine(model), 0.0
    batch: Any = engine._unet_batch
    call = batch._call

    def counted(x: Any, t: Any, condition: Any, deep: Any, keeps: bool) -> Any:
        nonlocal work
        work += 1 if deep is None else REUSE_COST
        return call(x, t, condition, deep, keeps)

    batch._call = counted
    started_s = time.process_time()
    found = {result.request: result for result in engine.generate(requests)}
    seconds = time.process_time() - started_s
    return [np.asarray(found[request].image) for request in requests], seconds, work


def adherence(scenes: Sequence[world.Scene], pictures: Sequence[np.ndarray]) -> float:
    """The share of pictures with both colours and the shape as the prompt says."""
    pairs = [(checker.read(p), s) for p, s in zip(pictures, scenes, strict=True)]
    return float(
        np.mean([(r.colour, r.shape, r.ground) == (s.colour, s.shape, s.ground) for r, s in pairs])
    )


def psnr(pictures: Sequence[np.ndarray], plain: Sequence[np.ndarray]) -> float:
    """Decibels, the median of all pictures."""
    found = []
    for one, other in zip(pictures, plain, strict=True):
        error = float(np.mean((one.astype(float) - other.astype(float)) ** 2))
        found.append(min(MAX_PSNR, 10 * np.log10(255**2 / error)) if error else MAX_PSNR)
    return float(np.median(found))


def measure(model: Model, scenes: Sequence[world.Scene]) -> list[dict[str, Any]]:
    """A row for each cell of the grid, the plain one first."""
    requests, rows = plain_requests(scenes), list[dict[str, Any]]()
    for settings in ({}, THRIFTY):  # records the UNet
        draw(model, [replace(each, steps=6, **settings) for each in requests[:8]])
    plain: list[np.ndarray] = []
    print(
        f"{'guidance':>12}{'cache':>7}{'CPU s':>8}{'speed-up':>10}{'by work':>9}{'PSNR dB':>9}"
        f"{'adherence':>11}"
    )
    for guidance, cache in itertools.product(GUIDANCE, CACHE):
        settings = {"guidance_interval": guidance, "cache_interval": cache}
        pictures, seconds, work = draw(model, [replace(each, **settings) for each in requests])
        plain = plain or pictures
        row = {**settings, "cpu_s": seconds, "work": work}
        first = (rows or [row])[0]
        row |= {"speed_up": first["cpu_s"] / seconds, "by_work": first["work"] / work}
        row |= {"psnr_db": psnr(pictures, plain), "adherence": adherence(scenes, pictures)}
        rows.append(row)
        shown = "all" if guidance is None else "{:g}-{:g}".format(*guidance)
        print(
            f"{shown:>12}{cache:7}{seconds:8.2f}{row['speed_up']:10.2f}{row['by_work']:9.2f}"
            f"{row['psnr_db']:9.1f}{row['adherence']:11.1%}",
            flush=True,
        )
    return rows


def mix(model: Model, scenes: Sequence[world.Scene]) -> dict[str, Any]:
    """Plain and thrifty rows by turns in the same calls, against each kind by itself."""
    plain = plain_requests(scenes)
    thrifty = [replace(request, **THRIFTY) for request in plain]
    apart, seconds, _ = zip(*(draw(model, kind) for kind in (plain, thrifty)), strict=True)
    both = [each for pair in zip(plain, thrifty, strict=True) for each in pair]
    pictures, mixed_s, _ = draw(model, both)
    moved = [
        sum(not np.array_equal(a, b) for a, b in zip(pictures[n::2], apart[n], strict=True))
        for n in (0, 1)
    ]
    row = {"thrifty": THRIFTY, "apart_cpu_s": sum(seconds), "mixed_cpu_s": mixed_s}
    row |= {"plain_moved": moved[0], "thrifty_moved": moved[1]}
    print(
        f"\nplain and thrifty ({THRIFTY}) in the same calls: {mixed_s:.2f} CPU s, apart "
        f"{row['apart_cpu_s']:.2f}; pictures whose bits moved: {moved[0]} plain, {moved[1]} "
        f"thrifty of {len(scenes)} each"
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="starter")
    parser.add_argument("--pictures", type=int, default=96)
    args = parser.parse_args()
    num_left_out = args.pictures // 4
    scenes = random_scenes(args.pictures - num_left_out) + left_out_scenes(num_left_out)
    model = load_model(args.model)
    rows, mixed = measure(model, scenes), mix(model, scenes)
    facts = {**vars(args), "torch": torch.__version__, "threads": torch.get_num_threads()}
    out = Path(__file__).with_suffix(".json")
    whole = {"settings": facts, "results": rows, "mixed": mixed}
    out.write_text(json.dumps(whole, indent=2) + "\n")


if __name__ == "__main__":
    main()
