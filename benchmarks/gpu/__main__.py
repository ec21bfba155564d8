"""What full-size SDXL costs and keeps on a GPU: `python -m benchmarks.gpu`.

No Ray, no hub, no files but the starter's: random weights of SDXL's real shapes are made on the
device. The JSON is written after each measurement, so that a run that is cut short still counts.
`--device cpu --small` runs every line on a thin model and tells no speed.
"""

import argparse
import json
import time
import traceback
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.bench import Bench

ITEMS = (
    "bits",
    "steps",
    "images",
    "lora",
    "memory",
    "syncs",
    "training",
    "devices",
    "invariance",
    "vae",
    "cold",
)
"""Most important first."""
WAYS = ("eager", "replay", "blocks", "full", "whole")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="a thin model; tells no speed")
    parser.add_argument("--items", nargs="+", choices=ITEMS, default=list(ITEMS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--budget-s", type=float, default=480, help="no item begins after it")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu.json"))
    args = parser.parse_args()
    started_s = time.perf_counter()
    found: dict[str, Any] = {"settings": settings(args), "items": {}}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    bench = Bench(args.device, args.small, args.ways)
    for name in args.items:
        if time.perf_counter() - started_s > args.budget_s:
            print(f"{name}: left out, the budget of {args.budget_s:.0f} s is used up", flush=True)
            continue
        rows = found["items"].setdefault(name, [])
        item_s = time.perf_counter()
        try:
            for row in import_module(f"benchmarks.gpu.{name}").run(bench):
                rows.append(row)
                print(name, shown(row), flush=True)
                args.out.write_text(json.dumps(found, indent=1) + "\n")
        except Exception as error:  # the other items still count
            traceback.print_exc()
            rows.append({"error": f"{type(error).__name__}: {error}".split("\n")[0]})
        rows.append({"item_s": round(time.perf_counter() - item_s, 1)})
        print(f"{name}: {time.perf_counter() - item_s:.0f} s", flush=True)
        args.out.write_text(json.dumps(found, indent=1) + "\n")


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Card, versions and date."""
    import diffusers

    cuda = args.device.startswith("cuda")
    return {
        "card": torch.cuda.get_device_name() if cuda else "CPU",
        "small": args.small,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
    }


def shown(row: dict[str, Any]) -> str:
    parts = []
    for name, value in row.items():
        parts.append(f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}")
    return " ".join(parts)


if __name__ == "__main__":
    main()
