"""What adapters cost on this machine: the same requests without and with them, in one run.

`python -m benchmarks.adapters [--model starter] [--rounds 3]` prints CPU seconds of eight requests:
without adapters, all with the same, each with its own, and with the same in the weights; calls of a
fixed shape as a job has them, or as large as needed as in serving. Rounds alternate, and ratios are
of medians. Writes benchmarks/adapters.json.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from rayjobs.diffusion.engine import Engine
from rayjobs.diffusion.model import Model, ModelOptions, load_model
from rayjobs.diffusion.request import Lora, Request

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
ROWS = 8


def write_adapter(model: Model, folder: Path, number: int, rank: int) -> str:
    """Random low-rank factors for every attention layer of the UNet."""
    draw = torch.Generator().manual_seed(number)
    tensors = {}
    for name, layer in model.unet.named_modules():
        if isinstance(layer, torch.nn.Linear) and name.endswith(ATTENTION):
            down = torch.randn(rank, layer.in_features, generator=draw) * 0.05
            up = torch.randn(layer.out_features, rank, generator=draw) * 0.05
            tensors |= {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
    path = folder / f"{number}.safetensors"
    save_file(tensors, path)
    return str(path)


def run(model: Model, paths: list[str], *, fixed_shape: bool, fuse: bool, steps: int) -> float:
    """CPU seconds of as many requests as there are paths; an empty one is none."""
    engine = Engine(model, max_rows=ROWS, fixed_shape=fixed_shape)
    if fuse:
        engine.loras.fuse([(paths[0], 1.0)])
    requests = [
        Request(
            prompt="a photo of a red star",
            seed=seed,
            steps=steps,
            guidance_scale=5.0,
            loras=(Lora(path=path),) if path else (),
        )
        for seed, path in enumerate(paths)
    ]
    started_s = time.process_time()
    results = list(engine.generate(requests))
    seconds = time.process_time() - started_s
    assert all(result.image is not None for result in results), results[0].error
    engine.loras.detach()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="starter")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = load_model(args.model, ModelOptions(dtype=args.dtype, device="cpu"))
    with tempfile.TemporaryDirectory() as folder:
        paths = [write_adapter(model, Path(folder), number, args.rank) for number in range(ROWS)]
        works = {"none": [""] * ROWS, "the same": paths[:1] * ROWS, "each its own": paths}
        calls: dict[tuple[str, bool], Callable[[], float]] = {
            (name, fixed): lambda p=given, f=fixed: run(
                model, p, fixed_shape=f, fuse=False, steps=args.steps
            )
            for fixed in (True, False)
            for name, given in works.items()
        }
        calls["in the weights", True] = lambda: run(
            model, works["the same"], fixed_shape=True, fuse=True, steps=args.steps
        )
        times: dict[tuple[str, bool], list[float]] = {key: [] for key in calls}
        for round_number in range(args.rounds + 1):
            for key, call in calls.items():
                seconds = call()
                if round_number:
                    times[key].append(seconds)
    table: list[dict[str, Any]] = []
    print(f"{'adapters':16}{'calls':14}{'CPU s':>8}{'of none':>9}")
    for (name, fixed), seconds_of in times.items():
        median = statistics.median(seconds_of)
        ratio = median / statistics.median(times["none", fixed])
        shape = "fixed shape" if fixed else "as needed"
        print(f"{name:16}{shape:14}{median:8.2f}{ratio:9.2f}")
        table.append({"adapters": name, "calls": shape, "cpu_s": median, "ratio": ratio})
    facts = {**vars(args), "torch": torch.__version__}
    out = Path(__file__).with_suffix(".json")
    out.write_text(json.dumps({"settings": facts, "results": table}, indent=2) + "\n")


if __name__ == "__main__":
    main()
