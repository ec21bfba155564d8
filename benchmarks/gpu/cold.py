"""Seconds until a compiled UNet answers: with nothing kept, and with Inductor's kept artifacts."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu.bench import Bench

CHILD = """
import sys, time, torch
from benchmarks.gpu import paths
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.model import unet_inputs
device, small, file, mode = sys.argv[1], sys.argv[2] == "True", sys.argv[3], sys.argv[4]
bench = Bench(device, small, [])
model = bench.model
if mode == "cached":
    torch.compiler.load_cache_artifacts(open(file, "rb").read())
with torch.no_grad():
    path = paths.compiled(model, "full")
    for num in (4, 2, 16, 1):
        first = paths.first_call_s(path, unet_inputs(model, num, bench.side), device)
        print(f"first {num} {first:.2f}", flush=True)
if mode == "cold":
    data, info = torch.compiler.save_cache_artifacts()
    open(file, "wb").write(data)
    print(f"bytes 0 {len(data)}")
"""


def run(bench: Bench) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "artifacts"
        for mode in ("cold", "cached"):
            kept = os.environ | {"TORCHINDUCTOR_CACHE_DIR": f"{name}/{mode}"}
            command = [bench.device, str(bench.small), str(file), mode]
            done = subprocess.run(
                [sys.executable, "-c", CHILD, *command], capture_output=True, text=True, env=kept
            )
            lines = [
                line.split() for line in done.stdout.splitlines() if line[:5] in ("first", "bytes")
            ]
            row = {f"{word} {number}": float(value) for word, number, value in lines}
            yield (
                {"start": mode}
                | row
                | ({} if done.returncode == 0 else {"error": done.stderr[-400:]})
            )
