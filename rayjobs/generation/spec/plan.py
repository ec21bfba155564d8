"""The plan of a job: what it would make and cost, by arithmetic, before anything is made.

Owns counts, sizes, times and how they are printed. Reads no weights, knows neither torch nor Ray.
"""

import itertools
import json
import math
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rayjobs import storage
from rayjobs.config import BadInput
from rayjobs.diffusion.economy.plan import check_cache_interval, check_guidance_interval
from rayjobs.diffusion.passes import final_size
from rayjobs.diffusion.request import check_schedule, check_side, check_strength
from rayjobs.generation.config import MOST_STEPS, GenerateConfig, OutputConfig
from rayjobs.generation.prompts.snapshot import (
    InlinePrompts,
    Snapshot,
    list_pictures,
    write_snapshot,
)
from rayjobs.generation.spec.records import Spec, sizes_of
from rayjobs.models.facts import read_facts
from rayjobs.models.options import SourceConfig

LOSSLESS = {"png": 1.3, "webp-lossless": 0.9}
LOSSY = {
    "jpeg": ((50, 80, 95, 100), (0.08, 0.14, 0.30, 0.63)),
    "webp": ((50, 80, 95, 100), (0.055, 0.095, 0.24, 0.33)),
}
"""Bytes a pixel, by quality. All were measured on photographs of 512 pixels; those of 1024 are
about a tenth smaller, flat drawings many times."""
USUAL_SIDE = 1024
MAX_COUNTED_TEXTS = 20_000
"""Up to so many texts are made to count the different ones."""
JUDGED = {"width", "height", "steps", "strength", "guidance_scale"}
JUDGED |= {"guidance_interval", "cache_interval"}
"""Columns of rows that are looked at for values that no image can have."""
HOUR_S = 3600.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a job would make; what is not known, such as hours without a rate, is None."""

    num_prompts: int
    num_texts: int
    """Texts made of each prompt."""
    num_parameters: int
    """Combinations of the parameter axes."""
    num_inits: int
    """Init images; 1 without any in the configuration."""
    num_seeds: int
    num_records: int
    num_shards: int
    num_unique_prompts: int | None
    """Different texts, where counting them is cheap."""
    num_bytes: int
    """Estimate for all images."""
    num_workers: int
    """Workers that the job can keep busy."""
    device_hours: float | None
    wall_hours: float | None
    cost: float | None
    assumptions: tuple[str, ...]


def plan(config: GenerateConfig, *, rate: float | None = None, price: float | None = None) -> Plan:
    """Count what the job would make.

    `rate` is images a second of one worker, `price` that of a device-hour: of a GPU where workers
    have GPUs, else of a worker. Raises BadInput or StorageError as the job itself would.
    """
    for name, value in (("--rate", rate), ("--price", price)):
        if value is not None and not 0 < value < float("inf"):
            raise BadInput(f"{name} is {value}; it must be a number above 0")
    with _opened(config) as spec:
        return _plan(spec, rate, price)


def record(config: GenerateConfig, number: int) -> dict[str, Any]:
    """Record `number` of the job and its shard, as plain JSON values."""
    steps = config.sampler.own_steps or read_facts(config.model).steps
    sampler = config.sampler.model_copy(update={"steps": steps})
    with _opened(config.model_copy(update={"sampler": sampler})) as spec:
        if not 0 <= number < spec.num_records:
            raise BadInput(f"--record is {number}; the job has records 0 .. {spec.num_records - 1}")
        values = asdict(spec.record(number))
    values["shard"] = number // config.output.images_per_shard
    plain: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return plain


def describe(plan: Plan) -> str:
    """The plan in lines for people."""
    counts = {
        "prompt": plan.num_prompts,
        "text": plan.num_texts,
        "parameter combination": plan.num_parameters,
        "init image": plan.num_inits,
        "seed": plan.num_seeds,
    }
    factor_texts = [_counted(count, name) for name, count in counts.items() if count > 1]
    lines = [("records", f"{plan.num_records:,} = {' x '.join(factor_texts or ['1 prompt'])}")]
    if plan.num_unique_prompts is not None:
        total = plan.num_prompts * plan.num_texts
        twice = f" of {total:,}: the same text and seed make the same image again"
        lines.append(
            (
                "texts",
                f"{plan.num_unique_prompts:,} different"
                f"{twice if plan.num_unique_prompts < total else ''}",
            )
        )
    lines.append(("shards", f"{plan.num_shards:,}"))
    each = _amount(plan.num_bytes / plan.num_records)
    lines.append(("bytes", f"about {_amount(plan.num_bytes)}, {each} an image"))
    if plan.device_hours is None or plan.wall_hours is None:
        lines.append(("device-hours", "give --rate, or --probe to measure it"))
    else:
        workers = _counted(plan.num_workers, "worker")
        lines.append(("device-hours", f"{plan.device_hours:,.2f}"))
        lines.append(("wall time", f"{_time(plan.wall_hours)} with {workers}"))
    if plan.cost is not None:
        lines.append(("cost", f"{plan.cost:,.2f}"))
    lines += [("assumed" if n == 0 else "", text) for n, text in enumerate(plan.assumptions)]
    return "\n".join(f"{name:<14}{text}" for name, text in lines)


def bytes_per_pixel(output: OutputConfig) -> float:
    """Of a picture like a photograph, in the format of the output."""
    if output.image_format in LOSSLESS:
        return LOSSLESS[output.image_format]
    return float(np.interp(output.quality, *LOSSY[output.image_format]))


@contextmanager
def _opened(config: GenerateConfig) -> Generator[Spec]:
    """The job's spec; only prompt files need a snapshot, which is gone afterwards."""
    for uri in (config.prompts.uri, config.init.uri):
        if uri is not None and storage.is_remote(uri):
            storage.check(uri)
    inits = list_pictures(config.init.uri) if config.init.uri is not None else ()
    if config.prompts.uri is None:
        yield Spec(config, InlinePrompts(config.prompts), inits)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "snapshot.parquet")
        uri = config.model.uri
        family = None if storage.is_remote(uri) else read_facts(uri).family
        write_snapshot(config.prompts, path, family)
        yield Spec(config, Snapshot(path), inits)


def _plan(spec: Spec, rate: float | None, price: float | None) -> Plan:
    config = spec.config
    pixels, assumptions = _pixels(spec)
    assumptions += _refused_rows(spec)
    workers = min(config.workers.max_workers, spec.num_shards)
    device_hours = wall_hours = None
    if rate is not None:
        device_hours = spec.num_records / rate / HOUR_S * (config.workers.num_gpus or 1)
        rounds = -(-spec.num_shards // workers)
        shard = min(config.output.images_per_shard, spec.num_records)
        wall_hours = rounds * shard / rate / HOUR_S
        assumptions.append(f"{rate:.3g} images a second of each worker, from start to end")
    return Plan(
        num_prompts=spec.num_prompts,
        num_texts=spec.num_texts,
        num_parameters=spec.num_parameters,
        num_inits=spec.num_inits,
        num_seeds=spec.num_seeds,
        num_records=spec.num_records,
        num_shards=spec.num_shards,
        num_unique_prompts=_num_unique(spec),
        num_bytes=spec.num_records * round(pixels * bytes_per_pixel(config.output)),
        num_workers=workers,
        device_hours=device_hours,
        wall_hours=wall_hours,
        cost=None if device_hours is None or price is None else device_hours * price,
        assumptions=tuple(assumptions),
    )


def _pixels(spec: Spec) -> tuple[float, list[str]]:
    """Mean pixels of an image, and what had to be assumed about them and their bytes."""
    config, output = spec.config, spec.config.output
    quality = f" of quality {output.quality}" if output.image_format in LOSSY else ""
    per_pixel = bytes_per_pixel(output)
    assumptions = [
        f"{per_pixel:.2g} bytes a pixel, as {output.image_format}{quality} of photographs have"
    ]
    sizes = sizes_of(config)
    own = _model_side(config.model)
    side = own or USUAL_SIDE
    if None in itertools.chain(*sizes):
        known = "as the model's configuration says" if own else "since the model is not at hand"
        assumptions.append(f"images of {side} pixels where no size is given, {known}")
    if {"width", "height"} & set(spec.rows.columns):
        assumptions.append("rows with a size of their own are counted like the others")
    passes = [each.asked for each in config.passes]
    finals = [final_size(passes, w or side, h or side) for w, h in sizes]
    return sum(width * height for width, height in finals) / len(finals), assumptions


def _refused_rows(spec: Spec) -> list[str]:
    """What is said of rows with a value that no image can have: their records will fail."""
    if not JUDGED & set(spec.rows.columns):
        return []
    refused = []
    for number in range(min(spec.num_prompts, MAX_COUNTED_TEXTS)):
        row = spec.rows.row(number)
        try:
            check_side("width", row.get("width"))
            check_side("height", row.get("height"))
            _check_steps(row, spec.config)
            _check_guidance(row.get("guidance_scale"))
            check_guidance_interval(row.get("guidance_interval"))
            check_cache_interval(row.get("cache_interval") or 1)
        except ValueError as error:
            refused.append(f"row {number + 1}: {error}")
    if not refused:
        return []
    return [f"the records of {_counted(len(refused), 'row')} will fail, such as {refused[0]}"]


def _check_steps(row: dict[str, Any], config: GenerateConfig) -> None:
    """Raise ValueError for steps or a strength that leave nothing to do."""
    steps, strength = row.get("steps"), row.get("strength")
    if steps is not None and not 1 <= steps <= MOST_STEPS:
        raise ValueError(f"steps is {steps}; it must be from 1 to {MOST_STEPS}")
    check_schedule(config.sampler.timesteps, config.sampler.sigmas, steps)
    if row.get("init_image") is not None or config.init.uri is not None:
        own = config.init.strength if strength is None else strength
        check_strength(own, steps or config.sampler.own_steps or MOST_STEPS)


def _check_guidance(scale: float | None) -> None:
    if scale is not None and not 0 <= scale < math.inf:
        raise ValueError(f"guidance_scale is {scale}; it must be a number from 0")


def _model_side(model: SourceConfig) -> int | None:
    """The model's own size, where its configuration lies on this machine."""
    if storage.is_remote(model.uri):
        return None
    local = model.model_copy(update={"uri": storage.absolute_if_path(model.uri)})
    return read_facts(local).side


def _num_unique(spec: Spec) -> int | None:
    """Different texts, counted by looking at them where they are few."""
    if spec.num_prompts * spec.num_texts > MAX_COUNTED_TEXTS:
        return None
    each = spec.num_parameters * spec.num_inits * spec.num_seeds
    return len({spec.record(first).prompt for first in range(0, spec.num_records, each)})


def _counted(count: int, name: str) -> str:
    return f"{count:,} {name}{'s' if count > 1 else ''}"


def _amount(num_bytes: float) -> str:
    for unit in ("bytes", "KB", "MB", "GB", "TB", "PB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.3g} EB"


def _time(hours: float) -> str:
    if hours < 2:
        return f"{hours * 60:.1f} minutes"
    return f"{hours:.1f} hours" if hours < 48 else f"{hours / 24:,.1f} days"
