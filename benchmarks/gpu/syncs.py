"""Where the host waits for the device: in a steady step, at an arrival, at a preview.

Owns the counts, by torch's own debug mode, on the starter model in the device's dtype.
"""

import io
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from PIL import Image

from benchmarks.gpu.bench import Bench
from rayjobs.diffusion.engine import Engine
from rayjobs.diffusion.model import ModelOptions, load_model
from rayjobs.diffusion.request import Request
from rayjobs.diffusion.sampler_names import EDM, SAMPLERS

STEPS = 8


def run(bench: Bench) -> Iterator[dict[str, Any]]:
    model = load_model("starter", ModelOptions(device=bench.device))
    names = [name for name, (kind, _) in SAMPLERS.items() if kind not in EDM]
    side = model.default_side
    picture = io.BytesIO()
    Image.effect_noise((side, side), 40).convert("RGB").save(picture, "PNG")
    mask = io.BytesIO()
    Image.linear_gradient("L").resize((side, side)).save(mask, "PNG")
    modes: dict[str, dict[str, Any]] = {
        "text to image": {},
        "image to image": {"init_image": picture.getvalue(), "strength": 1.0},
        "inpainting": {
            "init_image": picture.getvalue(),
            "mask": mask.getvalue(),
            "strength": 1.0,
        },
    }
    for mode, extra in modes.items():
        for name in names[:2] if bench.small else names:
            if mode != "text to image" and name not in ("euler", "euler_a", "unipc", "ddim"):
                continue
            engine = Engine(model, max_rows=2, fixed_shape=False)
            try:
                found = _count(engine, name, extra)
            except (RuntimeError, ValueError) as error:
                found = {"error": str(error).split("\n")[0]}
            yield {"mode": mode, "sampler": name} | found


def _count(engine: Engine, sampler: str, extra: dict[str, Any]) -> dict[str, Any]:
    def request(seed: int) -> Request:
        prompt = f"a photo of a red star, {seed}"
        return Request(prompt=prompt, sampler=sampler, steps=STEPS, seed=seed, **extra)

    first = engine.add(request(0))
    while not engine.rows[first].is_ready or engine.progress(first)[0] < 3:
        engine.step()
    steady, where = _syncs(engine.step)
    preview, _ = _syncs(lambda: engine.begin_preview(first))
    arrival, at = _syncs(lambda: (engine.add(request(1)), engine.step()))
    return {"step": steady, "at": where, "arrival": arrival, "arrival_at": at, "preview": preview}


def _syncs(work: Callable[[], Any]) -> tuple[int, list[str]]:
    """How often the host waits in `work`, and on which lines."""
    if not torch.cuda.is_available():
        work()
        return 0, []
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in caught if "synchroniz" in str(w.message)]
    lines = [f"{w.filename.rsplit('/', 1)[-1]}:{w.lineno}" for w in waits]
    return len(lines), sorted(set(lines))
