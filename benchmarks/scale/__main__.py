"""A job of a hundred million images on a thousand GPUs, on paper.

`python -m benchmarks.scale [--images ...] [--gpus ...] [--parts requests driver ray start tail]`

The real spec, manifest, blocks and driver with a fake engine whose times are published figures
(`figures`). Prints Markdown tables and writes benchmarks/results/scale.json. What is measured and
what computed: docs/scale.md.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.scale import driver, figures, ray_data, requests, schedule, start, tables

RESULT = Path(__file__).parents[1] / "results" / "scale.json"


def count_requests(args: argparse.Namespace) -> dict[str, dict[str, int]]:
    with requests.server() as server:
        found = {
            "a worker, for each shard": requests.of_worker(server),
            "the driver, for a thousand shards": requests.of_driver(server),
            "the page, for 20 new shards": requests.of_page(server),
        }
    named = {
        who: {f"{kind} {folder or 'elsewhere'}": n for (kind, folder), n in asked.items() if n}
        for who, asked in found.items()
    }
    print(
        tables.requests(named), tables.storage_rates(named["a worker, for each shard"]), sep="\n\n"
    )
    return named


def measure_driver(args: argparse.Namespace) -> dict[str, Any]:
    pairs = [(images, gpus) for images in args.images for gpus in args.gpus]
    measured = [driver.measure(*pair) for pair in pairs]
    per_block = ray_data.measure() if "ray" in args.parts else None
    print(tables.drivers(measured, per_block))
    return {"runs": measured, "ray_data": per_block}


def compute_start(args: argparse.Namespace) -> list[dict[str, float]]:
    found = [start.start(gpus, each) for each in (figures.GPUS_PER_NODE, 1) for gpus in args.gpus]
    print(tables.starts(found))
    return found


def compute_tail(args: argparse.Namespace) -> list[Any]:
    found = []
    for images in args.images:
        for gpus in args.gpus:
            shards = -(-images // figures.IMAGES_PER_SHARD)
            calm, lossy = (schedule.tail(shards, gpus, rate) for rate in (0, figures.LOST_PER_HOUR))
            found.append((images, gpus, calm, lossy))
    print(tables.tails(found))
    return found


PARTS: dict[str, Callable[[argparse.Namespace], Any]] = {
    "requests": count_requests,
    "driver": measure_driver,
    "start": compute_start,
    "tail": compute_tail,
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--images", type=int, nargs="*", default=figures.IMAGES)
    parser.add_argument("--gpus", type=int, nargs="*", default=figures.GPUS)
    parser.add_argument("--parts", nargs="*", choices=[*PARTS, "ray"], default=[*PARTS, "ray"])
    parser.add_argument("--json", type=Path, default=RESULT)
    args = parser.parse_args(argv)
    found: dict[str, Any] = {"figures": _published()}
    if args.json.exists():  # of parts that are not run again
        found = json.loads(args.json.read_text()) | found
    for name, part in PARTS.items():
        if name in args.parts:
            print(f"\n## {name}\n")
            found[name] = part(args)
    args.json.write_text(json.dumps(found, indent=2) + "\n")


def _published() -> dict[str, Any]:
    return {name: value for name, value in vars(figures).items() if name.isupper()}


if __name__ == "__main__":
    main()
