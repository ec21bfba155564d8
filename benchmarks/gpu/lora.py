"""What adapters cost a call: none, one row of eight, every row its own; and their admission."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import paths, timing
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.model import call, unet_inputs
from rayjobs.diffusion.adapters.bank import Gathered, LoraBank
from rayjobs.diffusion.adapters.change import Change
from rayjobs.diffusion.adapters.deltas import LowRank
from rayjobs.diffusion.adapters.names import Layer
from rayjobs.diffusion.adapters.reader import Adapter
from rayjobs.diffusion.modules.replay import Beside

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
ROWS = 8


@torch.no_grad()
def run(bench: Bench) -> Iterator[dict[str, Any]]:
    model = bench.model
    bank = LoraBank(model, exact=False)
    rank = 4 if bench.small else 16
    rows = min(ROWS, max(bench.sizes) // 2)
    for number in range(rows):
        adapter = random_adapter(model.unet, number, rank)
        seconds = paths.first_call_s(
            lambda _, a=adapter: bank.admit(bank.place(a)), None, bench.device
        )
        if number in (0, rows - 1):
            yield {"what": "admit", "number": number, "seconds": seconds, "bytes": bank.num_bytes}
    inputs = unet_inputs(model, 2 * rows, bench.side)
    uses: dict[str, list[Any]] = {
        "none": [()] * 2 * rows,
        "one row": [(("0", 1.0),)] * 2 + [()] * (2 * rows - 2),
        "every row": [((str(place // 2), 1.0),) for place in range(2 * rows)],
    }
    for name, use in uses.items():
        for way, found in _measure(bench, bank.gather(use, ("unet",)), inputs):
            yield {"what": way, "adapters": name, "places": 2 * rows} | found
    small = unet_inputs(model, 2, bench.side)
    for way, found in _measure(bench, bank.gather(uses["every row"][:2], ("unet",)), small):
        yield {"what": way, "adapters": "one row alone", "places": 2} | found
    bank.detach()


def _measure(bench: Bench, gathered: Gathered, inputs: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """A call as it is, and replayed."""
    model = bench.model
    ways: dict[str, Callable[[], Any]] = {
        "call": lambda: call(model.unet, inputs),
        "replay": lambda: model.replay(*inputs, gathered.beside or Beside()),
    }
    for name, way in ways.items():
        with gathered.applied():
            found = timing.measure(way, bench.device, repeats=bench.repeats)
            queued = timing.queued_ms(way, bench.device, bench.repeats)
        yield name, {"queued_ms": queued} | found


def random_adapter(unet: Any, number: int, rank: int) -> Adapter:
    """Low-rank factors for every attention layer; `number` is its name too."""
    generator = torch.Generator().manual_seed(number)
    changes = {}
    for name, layer in unet.named_modules():
        if isinstance(layer, torch.nn.Linear) and name.endswith(ATTENTION):
            shapes = (rank, layer.in_features), (layer.out_features, rank)
            down, up = (torch.randn(s, generator=generator) * 0.02 for s in shapes)
            place = Layer("unet", name, "linear", tuple(layer.weight.shape))
            changes[place] = Change((LowRank(down, up),))
    return Adapter(str(number), Path(str(number)), str(number), changes)
