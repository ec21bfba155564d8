"""The UNet without its deep blocks: its own bits, where it is given what these gave."""

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from rayjobs.diffusion.economy.deep import DEEP, keeping, reusing, whole
from rayjobs.diffusion.model import Model
from rayjobs.diffusion.modules import replay
from rayjobs.diffusion.modules.replay import Replay

pytestmark = pytest.mark.model

SMALL: dict[str, Any] = {
    "sample_size": 8,
    "layers_per_block": 2,
    "block_out_channels": (8, 16, 16),
    "attention_head_dim": 2,
    "cross_attention_dim": 32,
    "norm_num_groups": 4,
}
ATTENTION = {  # as Stable Diffusion 1.x has it: the outermost level attends to the text
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
GUIDED = {"time_cond_proj_dim": 16}
"""With guidance as an input, as LCM has it."""


@pytest.fixture(params=["sdxl", "sd", "lcm"])
def unet(request: pytest.FixtureRequest, tiny: Model) -> Any:
    if request.param == "sdxl":
        return tiny.unet
    torch.manual_seed(0)
    more = GUIDED if request.param == "lcm" else {}
    return UNet2DConditionModel(**SMALL, **ATTENTION, **more).eval()


def call(unet: Any, places: int, height: int = 8) -> tuple[Any, ...]:
    draw = torch.Generator().manual_seed(places)
    width = unet.config.cross_attention_dim
    arguments: dict[str, Any] = {
        "encoder_hidden_states": torch.randn(places, 77, width, generator=draw)
    }
    if unet.config.addition_embed_type == "text_time":
        arguments["added_cond_kwargs"] = {
            "text_embeds": torch.randn(places, 32, generator=draw),
            "time_ids": torch.full((places, 6), 64.0),
        }
    if unet.config.time_cond_proj_dim is not None:
        arguments["timestep_cond"] = torch.randn(places, 16, generator=draw)
    x = torch.randn(places, 4, height, 8, generator=draw)
    return x, torch.linspace(1, 999, places), arguments


@torch.no_grad()
@pytest.mark.parametrize("height", [8, 9])
def test_the_same_bits_of_what_the_deep_blocks_gave(unet: Any, height: int) -> None:
    x, t, arguments = call(unet, 2, height)
    expected = unet(x, t, return_dict=False, **arguments)[0]
    noise, deep = keeping(unet, x, t, arguments)
    assert torch.equal(whole(unet, x, t, arguments), expected)
    assert torch.equal(noise, expected)
    assert torch.equal(reusing(unet, x, t, {**arguments, DEEP: deep}), expected)
    assert not torch.equal(reusing(unet, x, t, {**arguments, DEEP: deep + 1}), expected)
    assert not unet.up_blocks[-1]._forward_pre_hooks


@torch.no_grad()
def test_recordings_give_the_same(unet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "MAX_PLAIN_S", 1000.0)
    kept, taken = Replay(unet, keeping), Replay(unet, reusing)
    x, t, arguments = call(unet, 2)
    noise, deep = keeping(unet, x, t, arguments)
    for _ in range(2):  # the module's own, and the recording's
        again, deep_again = kept(x, t, arguments)
        assert torch.equal(again, noise)
        assert torch.equal(deep_again, deep)
        assert torch.equal(taken(x, t, {**arguments, DEEP: deep}), noise)
    assert [*kept._verified.values(), *taken._verified.values()] == [True, True]
    x, t, arguments = call(unet, 3)
    _, deep = keeping(unet, x, t, arguments)
    for _ in range(2):
        expected = reusing(unet, x, t, {**arguments, DEEP: deep * 2})
        assert torch.equal(taken(x, t, {**arguments, DEEP: deep * 2}), expected)
    assert all(taken._verified.values())
