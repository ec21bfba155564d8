"""Adapters beside the smallest SDXL."""

from collections.abc import Iterator

import pytest

from rayjobs.diffusion.adapters.bank import LoraBank
from rayjobs.diffusion.model import Model


@pytest.fixture
def bank(tiny: Model) -> Iterator[LoraBank]:
    bank = LoraBank(tiny)
    yield bank
    bank.detach()
