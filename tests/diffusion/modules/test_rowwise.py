"""A row's bits do not move with its slot, however many threads share a tensor."""

import pytest
import torch
from transformers.activations import QuickGELUActivation

from rayjobs.diffusion.engine import Engine
from rayjobs.diffusion.model import Model
from rayjobs.diffusion.modules.rowwise import use_for_activations
from rayjobs.diffusion.request import Request
from rayjobs.diffusion.rows.preparing import Parts, prepare_row


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("num_threads", [1, 3, 4, 7])
def test_an_activation(num_threads: int, layout: torch.memory_format) -> None:
    torch.set_num_threads(num_threads)
    for activation in (torch.nn.SiLU(), torch.nn.Mish(), QuickGELUActivation()):
        layers = torch.nn.Sequential(activation)
        use_for_activations(layers)
        for slots, channels in ((2, 640), (3, 37), (4, 320), (8, 320)):
            row = torch.randn(1, channels, 16, 16)
            x_PCHW = row.expand(slots, -1, -1, -1).contiguous(memory_format=layout)
            y_PCHW = layers(x_PCHW)
            assert y_PCHW.is_contiguous(memory_format=layout)
            assert all(torch.equal(y_PCHW[0], y_HW) for y_HW in y_PCHW)
            torch.testing.assert_close(y_PCHW, type(activation)()(x_PCHW))


def test_a_text(tiny: Model) -> None:
    """Of a model whose layers are of odd widths."""
    engine = Engine(tiny)
    parts = Parts(tiny, engine.loras, engine.controls, engine.ip_adapters)
    rows = [prepare_row(n, Request(prompt=f"a text {n}"), parts) for n in range(4)]
    texts = [row.texts[-1] for row in rows]
    first = Engine(tiny, max_rows=4).prompts.encode(texts)
    again = Engine(tiny, max_rows=4).prompts.encode(texts[::-1])[::-1]
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one.text_1LD, other.text_1LD)
