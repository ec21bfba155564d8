"""Adapters that make a model one of few steps: what they bring with them."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from rayjobs.diffusion.adapters.bank import LoraBank
from rayjobs.diffusion.control.bank import ControlBank
from rayjobs.diffusion.ip_adapter.bank import IpAdapterBank
from rayjobs.diffusion.model import Model
from rayjobs.diffusion.request import Lora, Request
from rayjobs.diffusion.rows.preparing import Parts, prepare_row
from rayjobs.diffusion.rows.row import Row
from tests.diffusion.adapters import formats_kohya
from tests.diffusion.adapters.made import make, write


def row_of(request: Request, model: Model, bank: LoraBank) -> Row:
    return prepare_row(0, request, Parts(model, bank, ControlBank(model), IpAdapterBank(model)))


@pytest.mark.parametrize(
    ("name", "asked", "kind"),
    [
        ("sdxl_lightning_4step_lora", None, "EulerDiscreteScheduler"),
        ("sdxl_lightning_4step_lora", "dpmpp_2m", "DPMSolverMultistepScheduler"),
        ("Hyper-SDXL-8steps-lora", "ddim", "DDIMScheduler"),
        ("lcm-lora-sdxl", None, "LCMScheduler"),
        ("lcm-lora-sdxl", "euler", "EulerDiscreteScheduler"),
        ("dmd2_sdxl_4step_lora", None, "LCMScheduler"),
        ("TCD-SDXL-LoRA", None, "TCDScheduler"),
        ("a-subject", None, "EulerDiscreteScheduler"),
    ],
)
def test_it_brings_its_sampler(
    tiny: Model, bank: LoraBank, tmp_path: Path, name: str, asked: str | None, kind: str
) -> None:
    """As its makers tell to change the scheduler of diffusers' pipeline."""
    path = write(make(tiny, formats_kohya.kohya_diffusers_names), tmp_path, f"{name}.safetensors")
    lora = (Lora(path=path, scale=0.7),)
    request = Request(prompt="x", steps=4, sampler=asked, loras=lora)
    sampler = row_of(request, tiny, bank).sampler
    is_trailing = name.startswith(("sdxl_lightning", "Hyper"))
    told = {"timestep_spacing": "trailing"} if is_trailing else {}
    expected: Any = getattr(diffusers, kind).from_config(tiny.scheduler.config, **told)
    expected.set_timesteps(4)
    assert type(sampler.scheduler) is type(expected)
    assert torch.equal(sampler.timesteps, expected.timesteps)
    without = row_of(Request(prompt="x", steps=4, sampler=asked), tiny, bank).sampler
    assert (type(without.scheduler) is type(expected)) == (asked is not None or kind[0] == "E")


@pytest.mark.parametrize(
    ("path", "title", "steps"),
    [
        ("lcm-lora-sdxl/pytorch_lora_weights.safetensors", "", 4),
        ("sdxl_lightning_8step_lora.safetensors", "", 8),
        ("fast.safetensors", "DMD2 4 step LoRA", 4),
        ("turbo/style.safetensors", "", None),
        ("porsche-911-turbo.safetensors", "", None),
        ("sd_xl_turbo_lora_v1.safetensors", "", 4),
        ("hypersonic-jets.safetensors", "", None),
        ("realvisXLLightning.safetensors", "", None),
        ("RealvisSDXLLightning_4Step.safetensors", "", 4),
    ],
)
def test_an_adapter_of_few_steps_is_known_by_what_it_is_called(
    tiny: Model, bank: LoraBank, tmp_path: Path, path: str, title: str, steps: int | None
) -> None:
    made = make(tiny, formats_kohya.kohya_diffusers_names)
    made.header = {"modelspec.title": title}
    file = tmp_path / path
    file.parent.mkdir(exist_ok=True)
    use = ((bank.load(write(made, file.parent, file.name)), 1.0),)
    usual = bank.usual(use)
    assert (
        usual == tiny.usual if steps is None else (usual.steps, usual.guidance_scale) == (steps, 1)
    )
    row = row_of(Request(prompt="x", seed=0, loras=(Lora(path=str(file)),)), tiny, bank)
    assert (row.num_slots == 1) == (steps is not None)
    assert not row.warnings
    asked = Request(prompt="x", seed=0, steps=30, loras=(Lora(path=str(file)),))
    assert bool(row_of(asked, tiny, bank).warnings) == (steps is not None)
