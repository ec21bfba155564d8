"""Adapters that cannot be used: refused with the key that tells it, and the way out."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rayjobs.diffusion.adapters.bank import LoraBank
from rayjobs.diffusion.model import Model
from tests.diffusion.adapters import formats_kohya, formats_peft
from tests.diffusion.adapters.made import (
    CONV,
    QUERY,
    SGM,
    Made,
    kohya,
    make,
    random,
    write,
)


def damaged(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Made], None]:
    def kind(made: Made) -> None:
        formats_kohya.put_kohya(made, QUERY, kohya(QUERY))
        change(made.tensors)

    return kind


def only(**tensors: torch.Tensor) -> Callable[[Made], None]:
    def kind(made: Made) -> None:
        made.tensors = {name.replace("__", "."): tensor for name, tensor in tensors.items()}

    return kind


def of_another(header: dict[str, str]) -> Callable[[Made], None]:
    def kind(made: Made) -> None:
        formats_kohya.kohya_text_encoders(made)
        made.header = header

    return kind


def with_alpha(alpha: torch.Tensor) -> Callable[[Made], None]:
    return damaged(lambda tensors: tensors.update({f"{Q}.alpha": alpha}))


def noted(**settings: object) -> Callable[[Made], None]:
    """As diffusers keeps peft's settings."""

    def kind(made: Made) -> None:
        formats_peft.peft_names(made)
        notes = {f"unet.{name}": value for name, value in settings.items()}
        made.header = {"lora_adapter_metadata": json.dumps(notes)}

    return kind


def with_notes(text: str) -> Callable[[Made], None]:
    def kind(made: Made) -> None:
        formats_peft.peft_names(made)
        made.header = {"lora_adapter_metadata": text}

    return kind


def twice(made: Made) -> None:
    formats_kohya.put_kohya(made, QUERY, kohya(QUERY))
    formats_kohya.put_kohya(made, QUERY, f"lora_unet_{SGM[QUERY]}")


Q = kohya(QUERY)
TE = "text_model_encoder_layers_1_self_attn_q_proj"
REFUSED: dict[str, tuple[Callable[[Made], None], str]] = {
    "no up factor": (damaged(lambda t: t.pop(f"{Q}.lora_up.weight")), "its up is missing"),
    "no down factor": (damaged(lambda t: t.pop(f"{Q}.lora_down.weight")), "its down is missing"),
    "alpha alone": (
        damaged(lambda t: t.update({f"{kohya(CONV)}.alpha": torch.ones(())})),
        "unet.down_blocks.1.resnets.0.conv1: its factors are missing",
    ),
    "magnitude alone": (only(**{f"{Q}__dora_scale": random(32, 1)}), "its factors are missing"),
    "half a LoHa": (only(**{f"{Q}__hada_w1_a": random(32, 2)}), "its hada_w1_b is missing"),
    "half a LoKr": (only(**{f"{Q}__lokr_w1": random(4, 4)}), "its lokr_w2_a is missing"),
    "NaN": (damaged(lambda t: t[f"{Q}.lora_up.weight"].fill_(float("nan"))), "NaN or infinity"),
    "int8": (
        damaged(lambda t: t.update({f"{Q}.lora_up.weight": torch.ones(32, 3).char()})),
        "is quantized",
    ),
    "scaled fp8": (
        damaged(lambda t: t.update({f"{Q}.scale_weight": random(2)})),
        "save it in fp16",
    ),
    "alpha of 0": (with_alpha(torch.tensor(0.0)), "its alpha is 0, which some tools read as"),
    "alpha beyond fp16": (with_alpha(torch.tensor(1e5).half()), "its alpha is inf: it was too"),
    "alpha of none": (with_alpha(torch.zeros(0)), "its alpha is 0 numbers, not one"),
    "alpha of several": (with_alpha(torch.ones(3)), "its alpha is 3 numbers, not one"),
    "rank 0": (
        only(**{f"{Q}__lora_down__weight": random(0, 32), f"{Q}__lora_up__weight": random(32, 0)}),
        "its rank is 0",
    ),
    "sides that do not meet": (
        only(
            **{
                f"{Q}__lokr_w1": random(4, 4),
                f"{Q}__lokr_w2_a": random(8, 2),
                f"{Q}__lokr_w2_b": random(3, 8),
            }
        ),
        "cannot be multiplied",
    ),
    "a bias of the down factor": (
        damaged(lambda t: t.update({f"unet.{QUERY}.lora_A.bias": random(3)})),
        "no layer for 'unet.down_blocks.1",
    ),
    "PiSSA": (noted(r=3, init_lora_weights="pissa_niter_4"), "changed the model's own weights"),
    "aLoRA": (noted(r=3, alora_invocation_tokens=[1]), "alora_invocation_tokens is not read"),
    "another kind of peft": (noted(peft_type="ADALORA"), "peft_type ADALORA is not read; merge it"),
    "a DoRA without lengths": (noted(r=3, use_dora=True), "its magnitude is missing"),
    "notes cut off": (with_notes('{"unet.r": 3'), "its lora_adapter_metadata cannot be read"),
    "notes of another form": (with_notes("[3]"), "its lora_adapter_metadata is no JSON object"),
    "an unknown tensor": (
        damaged(lambda t: t.update({f"{Q}.lora_magic": random(2)})),
        "lora_magic' is of no known adapter format",
    ),
    "a layer named twice": (twice, "are both for unet.down_blocks.1"),
    "an unknown layer": (
        damaged(lambda t: t.update({"lora_unet_down_blocks_7_conv.alpha": random(1)})),
        "has no layer for",
    ),
    "another width": (
        only(**{f"{Q}__lora_down__weight": random(2, 40), f"{Q}__lora_up__weight": random(40, 2)}),
        "do not fit a weight",
    ),
    "another width of a LoHa": (
        only(
            **{
                f"{Q}__hada_w{n}_{s}": random(*size)
                for n in (1, 2)
                for s, size in (("a", (16, 2)), ("b", (2, 64)))
            }
        ),
        "do not fit",
    ),
    "another width of a LoKr": (
        only(**{f"{Q}__lokr_w1": random(4, 4), f"{Q}__lokr_w2": random(9, 9)}),
        "do not fit a weight",
    ),
    "another width of a difference": (only(**{f"{Q}__diff": random(16, 64)}), "do not fit"),
    "text encoder of SD 1": (
        only(
            **{
                f"lora_te_{TE}__lora_down__weight": random(2, 32),
                f"lora_te_{TE}__lora_up__weight": random(32, 2),
            }
        ),
        "an adapter for Stable Diffusion 1.x or 2.x; this model is SDXL",
    ),
    "SD 1 by its header": (of_another({"ss_base_model_version": "sd_v1"}), "this model is SDXL"),
    "SD 1 by the specification": (
        of_another({"modelspec.architecture": "stable-diffusion-v1/lora"}),
        "this model is SDXL",
    ),
    "OFT": (only(**{f"{Q}__oft_blocks": random(4, 8, 8)}), "an OFT (orthogonal) adapter; merge it"),
    "BOFT": (only(**{f"{Q}__boft_R": random(4, 8, 8)}), "BOFT"),
    "(IA)3": (only(**{f"{Q}__weight": random(32), f"{Q}__on_input": torch.tensor(0)}), "(IA)3"),
    "GLoRA": (only(**{f"{Q}__a1__weight": random(2, 2)}), "a GLoRA adapter; merge it"),
    "FLUX": (
        only(**{"lora_unet_double_blocks_0_img_attn_proj__lora_down__weight": random(2, 2)}),
        "of a transformer model",
    ),
    "SD3": (
        only(**{"transformer__transformer_blocks__0__attn__to_q__lora_A__weight": random(2, 2)}),
        "of a transformer model",
    ),
    "a textual inversion": (only(emb_params=random(2, 32)), "a textual inversion, no LoRA"),
    "a whole model": (
        only(**{"model__diffusion_model__out__2__weight": random(4, 16, 3, 3)}),
        "give the file as the model",
    ),
    "nothing": (only(), "it holds no tensors"),
}


@pytest.mark.parametrize(("kind", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_used_is_refused_with_a_way_out(
    kind: Callable[[Made], None], reason: str, tiny: Model, bank: LoraBank, tmp_path: Path
) -> None:
    path = write(make(tiny, kind), tmp_path)
    with pytest.raises(ValueError, match=f"^LoRA adapter.safetensors: .*{re.escape(reason)}"):
        bank.load(path)
    assert bank.num_bytes == 0


def test_a_cut_file_is_refused(tiny: Model, bank: LoraBank, tmp_path: Path) -> None:
    path = Path(write(make(tiny, formats_kohya.dora), tmp_path))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot be read"):
        bank.load(str(path))
