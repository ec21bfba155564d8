"""The memory of a configuration's workers against the GPU on which they may be."""

import math
from collections.abc import Sequence
from typing import Any

from rayjobs.check import memory, model
from rayjobs.check.nodes import NodeType
from rayjobs.check.report import Report
from rayjobs.diffusion.passes import final_size

Seen = Sequence[tuple[Any, Any]]
"""The keys of each model that is loaded, and its files where they were looked at."""
USUAL_SIDE = 1024
TILE_PIXELS = 512 * 512


def check(
    kind: str, config: Any, seen: Seen, report: Report, cluster: Sequence[NodeType] = ()
) -> None:
    """Whether the smallest of the cluster's GPUs has room for what a worker holds."""
    share = config.scaling.num_gpus if kind == "serve" else config.workers.num_gpus
    if not share:
        return
    need = _need(kind, config, seen)
    together = max(1, int(1 / share + 1e-9))
    each = "" if together == 1 else f", and {together} share a GPU"
    report.tell(f"memory of a worker: at least {need}{each}")
    cards = [node.gpu_gib for node in cluster if node.num_gpus and node.gpu_gib]
    if cards and need.total * together > min(cards):
        has = f"the cluster's GPU has {min(cards):g} GiB"
        report.find([f"memory: a worker takes at least {need}{each}; {has}. {_way_out(kind)}"])


def _way_out(kind: str) -> str:
    if kind == "dreambooth":
        return "Train a LoRA, take more workers or an optimizer with less, or a larger GPU"
    less = "engine.max_rows or the models" if kind == "serve" else "the images' size"
    return f"Lower {less}, set vae_tiling of the model, or take a larger GPU"


def _need(kind: str, config: Any, seen: Seen) -> memory.Need:
    if kind == "dreambooth":
        return _of_training(config, model.num_parameters(seen[0][1]))
    needs = []
    for keys, weights in seen:
        pixels = _pixels(config, weights)
        tile = min(pixels, TILE_PIXELS) if getattr(keys, "vae_tiling", False) else pixels
        dtypes = (keys.dtype, getattr(keys, "vae_dtype", "auto"))
        parameters = model.num_parameters(weights)
        needs.append(memory.of_drawing(parameters, dtypes, _entries(kind, config), (pixels, tile)))
    return memory.Need(
        sum(need.weights for need in needs),
        max((need.calls for need in needs), default=0.0),
        max((need.decoding for need in needs), default=0.0),
    )


def _of_training(config: Any, parameters: dict[str, int]) -> memory.Need:
    train = config.train
    if train.method == "lora":
        return memory.of_lora(parameters, train.precision)
    shards = 1 if train.strategy == "ddp" else config.workers.min
    return memory.of_training(parameters, train.optimizer, train.fused_backward, shards)


def _entries(kind: str, config: Any) -> int:
    """Entries of a UNet call. On CUDA a job gives each image a call of its own."""
    if kind == "serve" and not config.engine.deterministic:
        return 2 * int(config.engine.max_rows)
    return 2


def _pixels(config: Any, weights: Any) -> int:
    """Of the largest image that is asked for."""
    side = weights.default_side if weights is not None else USUAL_SIDE
    axes, image = getattr(config, "parameters", None), getattr(config, "image", None)
    sides = []
    for name in ("width", "height"):
        given = getattr(axes, name, ()) or (getattr(image, name, None),)
        sides.append(max(value or side for value in given))
    wide, high = sides
    return math.prod(final_size([e.asked for e in getattr(config, "passes", ())], wide, high))
