"""Compiled calls: how often torch compiles, when, and what is drawn."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import save_file

from rayjobs.diffusion.engine import Engine
from rayjobs.diffusion.model import Model, ModelOptions, assemble
from rayjobs.diffusion.modules import compiled
from rayjobs.diffusion.request import Lora, Request, Result
from tests.diffusion.adapters.made import OUT, QUERY, kohya

pytestmark = pytest.mark.model

SIDES = [(64, 64), (64, 96), (96, 64), (128, 128)]
RANKS = (2, 3, 8)


def build(folder: Path, how: Any, **options: Any) -> Model:
    """An SDXL of two levels and random weights, the same ones each time."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    config = dict(pipeline.unet.config) | {"block_out_channels": (32, 64)}
    torch.manual_seed(0)
    pipeline.unet = UNet2DConditionModel.from_config(config)
    return assemble("tiny", pipeline, "0" * 64, ModelOptions(compile=how, **options), family="sdxl")


@pytest.fixture
def adapters(tmp_path: Path) -> list[Path]:
    """Of three ranks, for layers within blocks."""
    generator, paths = torch.Generator().manual_seed(0), []
    for rank in RANKS:
        tensors = {}
        for layer in (QUERY, OUT):
            down = torch.randn(rank, 64, generator=generator)
            up = 0.05 * torch.randn(64, rank, generator=generator)
            tensors[f"{kohya(layer)}.lora_down.weight"] = down
            tensors[f"{kohya(layer)}.lora_up.weight"] = up
        paths.append(tmp_path / f"rank-{rank}.safetensors")
        save_file(tensors, paths[-1])
    return paths


class Graphs:
    """A compiler that leaves graphs as they are and counts them, their runs, and the UNet calls
    that are to be made of them."""

    def __init__(self) -> None:
        self.made = self.runs = self.calls = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.made += 1

        def run(*args: Any) -> Any:
            self.runs += 1
            return graph(*args)

        return run


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Graphs]:
    graphs, call = Graphs(), compiled.Compiled.__call__

    def count(*args: Any) -> Any:
        graphs.calls += 1
        return call(*args)

    monkeypatch.setattr(compiled, "BACKEND", graphs)
    monkeypatch.setattr(compiled.Compiled, "__call__", count)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield graphs
    torch._dynamo.reset()


def draw(engine: Engine, requests: list[Request]) -> list[Result]:
    drawn = {result.id: result for result in engine.generate(requests, keep_pixels=True)}
    return [drawn[number] for number in sorted(drawn)]


def asked(number: int, size: tuple[int, int] = (64, 64), *loras: Path, **more: Any) -> Request:
    width, height = size
    uses = tuple(Lora(path=str(path)) for path in loras)
    settings = {"guidance_scale": 3.0, "steps": 2, "prompt": f"a star {number}"} | more
    return Request(seed=number, width=width, height=height, loras=uses, **settings)


def check_alike(ours: list[Result], theirs: list[Result], tolerance: float = 1e-4) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.error is None
        assert (mine.pixels - other.pixels).abs().max() < tolerance


@pytest.mark.slow
def test_blocks_are_compiled_once_whatever_comes(
    folders: dict[str, Path], adapters: list[Path], graphs: Graphs
) -> None:
    model, plain = build(folders["sdxl"], "blocks"), build(folders["sdxl"], "no")
    engine = Engine(model, max_rows=8, fixed_shape=False)
    engine.warm()
    blocks = [it for it in model.unet.modules() if isinstance(it, compiled.BLOCKS)]
    kinds = {(type(block), tuple(p.shape for p in block.parameters())) for block in blocks}
    made = graphs.made
    print(f"{made} graphs of {len(kinds)} kinds of blocks, for one slot and for more")
    # On a CPU oneDNN's convolutions have another for 16 slots; some have inputs in two layouts.
    assert 2 * len(kinds) <= made <= 3 * len(kinds) + 6
    assert (graphs.calls, graphs.runs) == (3, 3 * len(blocks))
    eager = Engine(plain, max_rows=8, fixed_shape=False)
    shuffled = torch.Generator().manual_seed(0)
    for turn in range(2):
        for number in torch.randperm(16, generator=shuffled).tolist():
            rows, one = divmod(number + 1, 2)
            size, lora = SIDES[(number + turn) % 4], adapters[number % 3]
            text = {"prompt": "a star " * (60 if number % 5 == 0 else 1), "steps": 1}
            requests = [asked(n, size, **text) for n in range(rows)]
            requests += [asked(99, size, guidance_scale=1.0, **text)] * one
            requests[: number % 3] = [asked(n, size, lora, **text) for n in range(number % 3)]
            check_alike(draw(engine, requests), draw(eager, requests))
    assert graphs.calls > 24
    assert (graphs.made, graphs.runs) == (made, graphs.calls * len(blocks))
    assert "graph_break" not in torch._dynamo.utils.counters


@pytest.mark.slow
def test_whole_unets_are_compiled_for_one_slot_and_for_more(
    folders: dict[str, Path], adapters: list[Path], graphs: Graphs
) -> None:
    """Adapters come later, put into the weights too; other sizes are not compiled."""
    model, plain = build(folders["sdxl"], "full"), build(folders["sdxl"], "no")
    engine = Engine(model, max_rows=2, fixed_shape=False)
    engine.warm([(64, 64)])
    assert (graphs.made, graphs.calls, graphs.runs) == (2, 3, 3)
    eager = Engine(plain, max_rows=2, fixed_shape=False)
    requests = [
        *(asked(n) for n in range(3)),
        asked(3, (64, 64), adapters[0]),
        asked(4, (64, 64), *adapters),
        asked(5, (64, 96)),
        asked(6, guidance_scale=1.0),
    ]
    check_alike(draw(engine, requests), draw(eager, requests))
    assert graphs.calls > 6
    assert (graphs.made, graphs.runs) == (2, graphs.calls)
    for each in (engine, eager):
        each.loras.detach()
    fused, beside = (Engine(one, max_rows=2) for one in (model, plain))
    use = [(str(adapters[2]), 0.7)]
    fused.loras.fuse(use)
    fused.warm([(64, 64)])
    again = Request(
        prompt="a star",
        seed=0,
        steps=2,
        width=64,
        height=64,
        loras=(Lora(path=use[0][0], scale=0.7),),
    )
    check_alike(draw(fused, [again]), draw(beside, [again]))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["blocks", "full"])
def test_inductor_draws_the_same_picture(folders: dict[str, Path], how: str) -> None:
    torch._dynamo.reset()
    engines = [Engine(build(folders["sdxl"], each), max_rows=2) for each in (how, "no")]
    engines[0].warm([(64, 64)])
    check_alike(*(draw(engine, [asked(0), asked(1)]) for engine in engines))


class Called:
    """Takes the place of compiled functions: how often each was called, and when."""

    def __init__(self) -> None:
        self.warming = self.running = 0

    def __call__(self, function: Any, owner: Any, **options: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.warming += owner.is_warming
            self.running += not owner.is_warming
            return function(*args, **kwargs)

        return call


def test_nothing_is_compiled_but_what_is_warm(
    folders: dict[str, Path], adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    called = Called()
    monkeypatch.setattr(compiled, "_Function", called)
    model, plain = build(folders["sdxl"], "full"), build(folders["sdxl"], "no")
    model.compiled._decodes = True
    model.compiled.renew()
    engine = Engine(model, max_rows=2, fixed_shape=False)
    cold = draw(engine, [asked(0)])
    assert (called.warming, called.running) == (0, 0)
    engine.warm([(64, 64)])
    assert (called.warming, called.running) == (6, 0)  # three calls and three decodes
    eager = Engine(plain, max_rows=2, fixed_shape=False)
    check_alike(cold, draw(eager, [asked(0)]))
    for requests, num_calls in (
        ([asked(0)], 3),
        ([asked(0, (64, 96))], 0),
        ([asked(0, (64, 64), adapters[0])], 1),
        ([asked(0), asked(1, (64, 64), adapters[1])], 4),
    ):
        called.running = 0
        check_alike(draw(engine, requests), draw(eager, requests))
        assert called.running == num_calls
    assert called.warming == 6


def test_fused_projections_take_no_more_memory(folders: dict[str, Path]) -> None:
    plain, fused = (build(folders["sdxl"], how) for how in ("no", "full"))
    for name, weight in plain.unet.state_dict().items():
        assert torch.equal(fused.unet.state_dict()[name], weight)
    twin = fused.compiled._twin
    num_bytes = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for unet in (fused.unet, twin)
        for tensor in unet.parameters()
    }
    assert sum(num_bytes.values()) == sum(p.nbytes for p in plain.unet.parameters())
