"""What a job would make: counts, bytes, hours and cost, and any of its records; nothing is made.

Owns the estimates and how they are told. Reads prompts only where they are files; loads no model.
"""

import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rayjobs import storage
from rayjobs.config import BadInput
from rayjobs.generation.config import GenerateConfig
from rayjobs.generation.spec import Rows, Spec

BYTES_PER_PIXEL = {"png": 1.6, "webp-lossless": 1.1, "webp": 0.35, "jpeg": 0.45}
"""Of photographs at quality 95; drawings take a fifth of it."""
USUAL_SIDE = 1024
"""Assumed where the configuration leaves the size to the model."""


@dataclass(frozen=True)
class Plan:
    """A job's size; what a rate is needed for is None without one."""

    num_prompts: int
    num_texts: int
    num_parameters: int
    num_inits: int
    num_seeds: int
    num_records: int
    num_shards: int
    side: tuple[int, int]
    num_bytes: float
    num_workers: int
    rate: float | None
    price: float | None

    @property
    def device_hours(self) -> float | None:
        return None if self.rate is None else self.num_records / self.rate / 3600

    @property
    def cost(self) -> float | None:
        hours = self.device_hours
        return None if hours is None or self.price is None else hours * self.price


def plan(config: GenerateConfig, rate: float | None = None, price: float | None = None) -> Plan:
    """Count a job. `rate` is images per second of one worker, `price` that of its hour."""
    for name, value in (("--rate", rate), ("--price", price)):
        if value is not None and not 0 < value < float("inf"):
            raise BadInput(f"{name} is {value}; it must be a number above 0")
    width = config.image.width or USUAL_SIDE
    height = config.image.height or USUAL_SIDE
    with _open(config) as spec:
        return Plan(
            num_prompts=spec.num_prompts,
            num_texts=spec.num_texts,
            num_parameters=spec.num_parameters,
            num_inits=spec.num_inits,
            num_seeds=spec.num_seeds,
            num_records=spec.num_records,
            num_shards=spec.num_shards,
            side=(width, height),
            num_bytes=spec.num_records * width * height * _bytes_per_pixel(config),
            num_workers=config.workers.max or config.workers.min,
            rate=rate,
            price=price,
        )


def record(config: GenerateConfig, number: int) -> dict[str, Any]:
    """What record `number` asks for."""
    with _open(config) as spec:
        if not 0 <= number < spec.num_records:
            raise BadInput(f"--record is {number}; the job has records 0 .. {spec.num_records - 1}")
        found = asdict(spec.record(number))
        return found | {"shard": number // config.output.images_per_shard}


def describe(found: Plan) -> str:
    """The plan in lines, the product first."""
    factors = {
        "prompts": found.num_prompts,
        "texts of each": found.num_texts,
        "parameters": found.num_parameters,
        "init images": found.num_inits,
        "seeds": found.num_seeds,
    }
    product = " x ".join(f"{n:,} {name}" for name, n in factors.items() if n > 1) or "1 prompt"
    width, height = found.side
    lines = [
        f"records       {found.num_records:,} = {product}",
        f"shards        {found.num_shards:,}",
        f"bytes         about {_size(found.num_bytes)}, at {width} x {height} pixels",
    ]
    if found.device_hours is None or found.rate is None:
        lines.append("device-hours  give --rate, or --probe to measure it")
    else:
        days = found.device_hours / found.num_workers / 24
        lines.append(f"device-hours  {found.device_hours:,.2f}, at {found.rate:.3g} images/s")
        lines.append(f"wall time     {_time(days)} with {found.num_workers} workers")
    if found.cost is not None:
        lines.append(f"cost          {found.cost:,.2f}, at {found.price:g} an hour")
    return "\n".join(lines)


class _Inline:
    """Prompts of the configuration itself, as rows."""

    columns = ("prompt",)

    def __init__(self, prompts: Sequence[str]):
        self._prompts = prompts or ("",)

    def __len__(self) -> int:
        return len(self._prompts)

    def row(self, number: int) -> dict[str, Any]:
        return {"prompt": self._prompts[number]}


@contextmanager
def _open(config: GenerateConfig) -> Generator[Spec]:
    from rayjobs.generation.source import Snapshot, list_pictures, write_snapshot

    for uri in (config.prompts.uri, config.init.uri):
        if uri is not None and storage.is_remote(uri):
            storage.check(uri)
    inits = list_pictures(config.init.uri) if config.init.uri is not None else ()
    if config.prompts.uri is None:
        rows: Rows = _Inline(config.prompts.inline)
        yield Spec(config, rows, inits)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "prompts.parquet")
        write_snapshot(config.prompts, path)
        yield Spec(config, Snapshot(path), inits)


def _bytes_per_pixel(config: GenerateConfig) -> float:
    return BYTES_PER_PIXEL[config.output.image_format]


def _size(num_bytes: float) -> str:
    for unit in ("bytes", "KB", "MB", "GB", "TB", "PB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.0f} EB"


def _time(days: float) -> str:
    if days >= 2:
        return f"{days:,.1f} days"
    hours = days * 24
    return f"{hours:.1f} hours" if hours >= 2 else f"{hours * 60:.1f} minutes"
