"""Memory by arithmetic, and the guide's tables of it."""

from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import sizing

GUIDE = Path(__file__).parents[1] / "docs" / "guides" / "sizing.md"


def test_what_lives_at_once_is_added_up() -> None:
    with FakeTensorMode():
        x = torch.empty(2**20, dtype=torch.uint8)
        # Of three results two live at a time; views and what was there before take nothing.
        found = sizing.peak_gib(lambda: ((x[:] + 1) * 2 + 1)[:8], [x])
    assert found == 2 * 2**20 / sizing.GIB
    assert [sizing.rows_that_fit(gib, 0.5) for gib in (-1.0, 0.4, 0.5, 2.2)] == ["-", "-", "1", "4"]


@pytest.mark.slow
def test_the_guide_has_what_is_computed() -> None:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model = sizing.build(mode, torch.bfloat16, small=False)
    assert sizing.drawing(mode, model) in GUIDE.read_text()
