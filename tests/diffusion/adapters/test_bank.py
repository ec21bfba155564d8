"""Adapters in memory and in a call: as large as they are, gathered once, few operations."""

import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu.model import UNET
from rayjobs.diffusion.adapters import bank as banks
from rayjobs.diffusion.adapters.bank import Gathered, LoraBank
from rayjobs.diffusion.adapters.change import Change
from rayjobs.diffusion.adapters.deltas import LowRank
from rayjobs.diffusion.adapters.names import Layer
from rayjobs.diffusion.adapters.reader import Adapter
from rayjobs.diffusion.model import Model
from rayjobs.diffusion.modules import replay
from tests.diffusion.adapters import formats_kohya
from tests.diffusion.adapters.made import make, write

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
VIEWS = ("view", "transpose", "t", "expand", "slice", "select", "unsqueeze", "detach", "alias")
GIB = 2**30


def adapter(unet: Any, name: str, rank: int, ends: tuple[str, ...] = ATTENTION) -> Adapter:
    """Random low-rank factors of the linear layers whose names end so."""
    draw = torch.Generator().manual_seed(sum(map(ord, name)))
    changes = {}
    for path, module in unet.named_modules():
        if isinstance(module, torch.nn.Linear) and path.endswith(ends):
            shapes = (rank, module.in_features), (module.out_features, rank)
            if module.weight.is_meta:
                down, up = (torch.empty(shape, device="meta") for shape in shapes)
            else:
                down, up = (torch.randn(shape, generator=draw) * 0.2 for shape in shapes)
            layer = Layer("unet", path, "linear", tuple(module.weight.shape))
            changes[layer] = Change((LowRank(down, up, 0.5),))
    return Adapter(name, Path(name), name, changes)


def test_adapters_of_many_ranks_take_no_more_than_their_own_at_full_size() -> None:
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel(**UNET).to(torch.bfloat16)
    model: Any = SimpleNamespace(unet=unet, text_encoders=[], family="sdxl", device="meta")
    bank = LoraBank(model)
    small = bank.place(adapter(unet, "small", 16))
    for number in range(64):
        named = replace(small.adapter, sha256=str(number))
        bank.admit(replace(small, adapter=named))
    assert 2.7 * GIB < bank.num_bytes < 2.9 * GIB
    bank.admit(bank.place(adapter(unet, "large", 128)))
    assert bank.num_bytes < 3.5 * GIB
    bank.forget("large")
    assert bank.num_bytes < 2.9 * GIB


def test_an_adapter_is_one_buffer_and_gives_it_back(tiny: Model, bank: LoraBank) -> None:
    placed = bank.place(adapter(tiny.unet, "a", 3))
    factors = [t for pair in placed.blocks["unet"].views.values() for t in pair]
    assert len({tensor.untyped_storage().data_ptr() for tensor in factors}) == 1
    sha256, held = bank.admit(placed), weakref.ref(placed.buffer)
    with bank.applied([((sha256, 1.0),)]):
        assert bank.num_bytes > placed.num_bytes
    del placed, factors
    bank.forget(sha256)
    assert held() is None
    assert bank.num_bytes == 0


@pytest.fixture
def uses(tiny: Model) -> list[Any]:
    """Slots of rows with guidance: two ranks, two adapters of a row, other layers, none."""
    rows = [(("a", 1.0),), (("b", 0.7), ("a", -0.5)), (), (("c", 1.5),)]
    return [row for row in rows for _ in range(2)]


@pytest.fixture
def filled(tiny: Model) -> Iterator[Any]:
    """Banks of three adapters."""
    made: list[LoraBank] = []

    def make(*, exact: bool) -> LoraBank:
        made.append(bank := LoraBank(tiny, exact=exact))
        for name, rank, ends in (("a", 3, ATTENTION), ("b", 8, ("to_q",)), ("c", 5, ("linear_1",))):
            bank.admit(bank.place(adapter(tiny.unet, name, rank, ends)))
        return bank

    yield make
    for bank in made:
        bank.detach()


@pytest.fixture(scope="module")
def inputs(tiny: Model) -> tuple[Any, ...]:
    """Of a UNet call of eight slots."""
    torch.manual_seed(0)
    added = {
        "text_embeds": torch.randn(8, tiny.text_encoders[-1].config.projection_dim),
        "time_ids": torch.full((8, 6), 64.0),
    }
    text = torch.randn(8, 77, tiny.unet.config.cross_attention_dim)
    given = {"encoder_hidden_states": text, "added_cond_kwargs": added}
    return torch.randn(8, 4, 8, 8), torch.full((8,), 500.0), given


@torch.no_grad()
def call(model: Model, inputs: tuple[Any, ...], gathered: Gathered) -> torch.Tensor:
    x, t, given = inputs
    with gathered.applied():
        noise: torch.Tensor = model.unet(x, t, return_dict=False, **given)[0]
        return noise


def test_all_ways_of_a_call_agree(
    tiny: Model,
    uses: list[Any],
    filled: Any,
    inputs: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = call(tiny, inputs, Gathered())
    exact = call(tiny, inputs, filled(exact=True).gather(uses))
    shared = call(tiny, inputs, filled(exact=False).gather(uses))
    assert (exact - plain)[[0, 1, 2, 3, 6, 7]].abs().amax((1, 2, 3)).min() > 1e-3
    assert (shared - exact).abs().max() < 1e-5
    assert torch.equal(exact[4:6], plain[4:6])
    assert torch.equal(shared[4:6], plain[4:6])
    monkeypatch.setattr(banks, "MAX_GATHERED_BYTES", 0)
    for is_exact, expected in ((True, exact), (False, shared)):
        late = filled(exact=is_exact).gather(uses)
        assert torch.equal(call(tiny, inputs, late), expected)
        assert late.beside is None


def test_both_slots_of_a_guided_row_share_factors(uses: list[Any], filled: Any) -> None:
    banks_of = [filled(exact=exact) for exact in (True, False)]
    sets = [{len(use.factors["down"]) for _, use in bank.gather(uses).uses} for bank in banks_of]
    assert sets == [{8}, {4}]


class Launches(TorchDispatchMode):
    """Counts operations that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.names[name] += not any(name.strip("_").endswith(view) for view in VIEWS)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(("exact", "each"), [(True, 3), (False, 2)])
def test_few_operations_a_layer_however_many_adapters(
    tiny: Model, inputs: Any, exact: bool, each: int
) -> None:
    """Those of a call: what is gathered once for its rows is not counted."""
    bank = LoraBank(tiny, exact=exact)
    made = [adapter(tiny.unet, str(number), 2 + number) for number in range(4)]
    names = [bank.admit(bank.place(one)) for one in made]
    gathered = bank.gather([((name, 1.0),) for name in names for _ in range(2)])
    counts = []
    for each_call in (Gathered(), gathered):
        with Launches() as launches:
            call(tiny, inputs, each_call)
        counts.append(launches.names.total())
    bank.detach()
    assert counts[1] - counts[0] == each * len(made[0].changes)


def test_a_mixed_call_is_replayed(
    tiny: Model,
    uses: list[Any],
    filled: Any,
    inputs: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With other adapters, scales and ranks of the same layers by one recording."""
    monkeypatch.setattr(replay, "MAX_PLAIN_S", 1000.0)
    bank, played = filled(exact=False), replay.Replay(tiny.unet)
    turned, halved = uses[2:] + uses[:2], [[(sha, s / 2) for sha, s in use] for use in uses]
    one = [(("a", 1.0),), ()] * 4
    for slots in (uses, turned, halved, one):
        gathered = bank.gather(slots)
        expected = call(tiny, inputs, gathered)
        with torch.no_grad(), gathered.applied():
            assert torch.equal(played(*inputs, gathered.beside), expected)  # the module's own
            with monkeypatch.context() as patch:
                patch.setattr(tiny.unet, "forward", None)
                assert torch.equal(played(*inputs, gathered.beside), expected)  # the recording's
    assert len(played._recordings) == 2  # of the layers of a and c, and of a
    assert all(played._verified.values())


def test_weights_that_hold_adapters_are_for_these_alone(
    tiny: Model, bank: LoraBank, tmp_path: Path
) -> None:
    path = write(make(tiny, formats_kohya.kohya_conv), tmp_path)
    assert bank.fuse([(path, 1.0)]) == bank.use_of([(path, 1.0)])
    for others in ([(path, 0.5)], []):
        with pytest.raises(ValueError, match="weights hold other adapters"):
            bank.use_of(others)
    assert bank.num_bytes == 0
