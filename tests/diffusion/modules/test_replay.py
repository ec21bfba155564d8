"""A recording gives the module's own bits, and steps aside where it cannot."""

from typing import Any

import pytest
import torch

from rayjobs.diffusion.model import Model, load_model
from rayjobs.diffusion.modules import onednn, replay
from rayjobs.diffusion.modules.replay import Replay

pytestmark = pytest.mark.model


@pytest.fixture(autouse=True)
def however_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls are recorded on a busy machine, too."""
    monkeypatch.setattr(replay, "MAX_PLAIN_S", 1000.0)


@pytest.fixture
def model() -> Model:
    return load_model("starter")


def call(places: int, height: int = 16, width: int = 16) -> tuple[Any, ...]:
    draw = torch.Generator().manual_seed(places + height)
    added = {
        "text_embeds": torch.randn(places, 64, generator=draw),
        "time_ids": torch.full((places, 6), 64.0),
    }
    text = torch.randn(places, 77, 128, generator=draw)
    x = torch.randn(places, 4, height, width, generator=draw)
    steps = torch.linspace(1, 999, places)
    return x, steps, {"encoder_hidden_states": text, "added_cond_kwargs": added}


def plain(model: Model, x: Any, t: Any, arguments: Any) -> torch.Tensor:
    noise: torch.Tensor = model.unet(x, t, return_dict=False, **arguments)[0]
    return noise


@torch.no_grad()
@pytest.mark.parametrize("linear", ["mkl", "onednn"])
def test_the_same_bits_in_every_shape(model: Model, linear: str) -> None:
    if linear == "onednn":
        onednn.use_for_linear(model.unet)
    replay = Replay(model.unet)
    for places in (2, 1, 5):
        for sides in ((16, 16), (24, 16), (8, 32)):
            inputs = call(places, *sides)
            expected = plain(model, *inputs)
            assert torch.equal(replay(*inputs), expected)  # the module's own, and the proof
            assert torch.equal(replay(*inputs), expected)  # the recording's
    assert all(replay._verified.values())
    assert len(replay._verified) == 9


@torch.no_grad()
def test_sides_that_the_recording_is_not_for(model: Model) -> None:
    replay = Replay(model.unet)
    replay(*call(2))
    odd = call(2, 15, 17)
    assert torch.equal(replay(*odd), plain(model, *odd))
    assert torch.equal(replay(*odd), plain(model, *odd))
    assert list(replay._verified.values()) == [True, False]


@torch.no_grad()
def test_python_is_left_out(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    replay = Replay(model.unet)
    inputs = call(2)
    expected = replay(*inputs)
    monkeypatch.setattr(model.unet, "forward", None)
    assert torch.equal(replay(*inputs), expected)


@torch.no_grad()
def test_errors_are_of_the_module_s_kind(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    replay = Replay(model.unet)
    inputs = call(2)
    expected = replay(*inputs)

    def out_of_memory(*args: Any, **more: Any) -> None:
        raise torch.OutOfMemoryError("none left")

    def broken(*args: Any) -> None:
        raise RuntimeError("in the interpreter: none left")

    with monkeypatch.context() as patch:
        patch.setattr(model.unet, "forward", out_of_memory)
        (kind,) = replay._recordings
        patch.setitem(replay._recordings, kind, broken)
        with pytest.raises(torch.OutOfMemoryError, match="none left"):
            replay(*inputs)
    assert torch.equal(replay(*inputs), expected)
    assert all(replay._verified.values())


@torch.no_grad()
def test_what_is_not_finite_proves_nothing(model: Model) -> None:
    replay = Replay(model.unet)
    x, steps, arguments = call(2)
    replay(x * float("nan"), steps, arguments)
    assert not replay._verified
    replay(x, steps, arguments)
    assert all(replay._verified.values())


@torch.no_grad()
def test_weights_are_those_of_the_moment(model: Model) -> None:
    replay = Replay(model.unet)
    inputs = call(2)
    replay(*inputs)
    before = replay(*inputs)
    model.unet.conv_out.weight.mul_(2)
    model.unet.conv_in.weight = torch.nn.Parameter(3 * model.unet.conv_in.weight, False)
    after = replay(*inputs)
    assert not torch.equal(before, after)
    assert torch.equal(after, plain(model, *inputs))


@torch.no_grad()
def test_a_long_call_is_not_made_twice(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "MAX_PLAIN_S", 0.0)
    unverified = Replay(model.unet)
    assert torch.equal(unverified(*call(2)), plain(model, *call(2)))
    assert not unverified._recordings
