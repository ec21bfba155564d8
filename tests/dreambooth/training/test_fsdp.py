"""Sharded weights: what travels between workers, and that losses are those of whole weights."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from rayjobs.dreambooth.training import fsdp, worker
from rayjobs.dreambooth.training.module import DreamBooth
from tests.dreambooth.fitting import resolved, settings

pytestmark = [
    pytest.mark.model,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    # Encoders give parts of their states, which nothing here overwrites.
    pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view"),
]
STEPS = 2


def build(folder: Path, photos: Path, compute: torch.dtype, mesh: Any) -> tuple[Any, DreamBooth]:
    """Batches and module, sharded where there is a mesh."""
    train = {"method": "full", "strategy": "fsdp", "learning_rate": 1e-3}
    run = resolved(settings(folder, photos, **train))
    batches, module = worker.build(run, worker.load(run.config, "cpu", compute), compute)
    if mesh is not None:
        fsdp.shard(module.tuned, mesh)
    module.configure_optimizers()
    return batches, module


def losses(batches: Any, module: DreamBooth, rank: int = 0, num_workers: int = 1) -> list[float]:
    """Of a few optimizer steps, over all workers."""
    found = []
    for step in range(STEPS):
        loss = module.losses(batches.batch(batches.schedule.rows(step, rank, num_workers))).sum()
        (loss * num_workers).backward()
        module.optimizer.step()
        module.optimizer.zero_grad()
        total = loss.detach()
        if num_workers > 1:
            dist.all_reduce(total)
        found.append(float(total))
    return found


@pytest.fixture
def mesh() -> Iterator[Any]:
    """One worker."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def test_weights_travel_in_the_dtype_they_are_computed_in(
    folders: dict[str, Path], photos: Path, mesh: Any
) -> None:
    """And gradients in float32, in which they are kept."""
    whole = losses(*build(folders["sdxl"], photos, torch.bfloat16, None))
    batches, module = build(folders["sdxl"], photos, torch.bfloat16, mesh)
    networks = dict(module.tuned.parts())
    seen = set()
    for network, layer in (("unet", "conv_in"), ("unet", "mid_block.resnets.0.conv1")):
        part = networks[network].get_submodule(layer)
        part.register_forward_hook(lambda part, *_: seen.add(part.weight.dtype))
    gradients = set()
    for parameter in module.tuned.trainable().values():
        parameter.register_post_accumulate_grad_hook(lambda p: gradients.add(p.grad.dtype))
    assert losses(batches, module) == pytest.approx(whole, rel=0.02)
    assert seen == {torch.bfloat16}
    assert gradients == {torch.float32}
    assert {p.dtype for p in module.tuned.trainable().values()} == {torch.float32}


def _one_of_two(rank: int, folder: Path, photos: Path, place: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{place}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    kinds = (torch.float32, torch.bfloat16)
    found = [losses(*build(folder, photos, kind, mesh), rank, 2) for kind in kinds]
    torch.save(found, f"{place}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_workers_come_to_the_losses_of_one(
    folders: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    place = str(tmp_path)
    torch.multiprocessing.spawn(_one_of_two, (folders["sdxl"], photos, place), nprocs=2)
    full, half = torch.load(tmp_path / "0.pt")
    assert torch.load(tmp_path / "1.pt") == [full, half]
    whole = losses(*build(folders["sdxl"], photos, torch.float32, None))
    assert full == pytest.approx(whole, abs=1e-5)
    assert half == pytest.approx(whole, rel=0.02)
