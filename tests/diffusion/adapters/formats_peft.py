"""Adapter files as diffusers, peft and ComfyUI name them."""

import json
from typing import Any

import torch

from tests.diffusion.adapters.formats_kohya import put_kohya, put_loha, put_lokr
from tests.diffusion.adapters.made import (
    CONV,
    FEED,
    OUT,
    QUERY,
    TEXT,
    Made,
    product,
    random,
)

# diffusers' and peft's names.


def put_named(made: Made, layer: str, down_key: str, up_key: str, part: str = "unet") -> None:
    down, up = made.factors(layer, 3, part)
    made.tensors |= {down_key: down, up_key: up}
    made.adds(layer, product(down, up), part)


def put_peft(
    made: Made,
    layer: str,
    name: str,
    alpha: float | None = None,
    rank: int = 3,
    root: bool = False,
) -> torch.Tensor:
    down, up = made.factors(layer, rank)
    made.tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    strength = 1.0 if alpha is None else alpha / rank ** (0.5 if root else 1)
    delta = product(down, up) * strength
    made.adds(layer, delta)
    return delta


def attention_processors(made: Made) -> None:
    _processors(made, "unet.")


def bare_attention_processors(made: Made) -> None:
    _processors(made, "")


def _processors(made: Made, prefix: str) -> None:
    for layer in (QUERY, OUT):
        block, _, name = layer.removesuffix(".0").rpartition(".")
        key = f"{prefix}{block}.processor.{name}_lora"
        put_named(made, layer, f"{key}.down.weight", f"{key}.up.weight")


def diffusers_names(made: Made) -> None:
    for layer in (QUERY, CONV):
        key = f"unet.{layer}.lora"
        put_named(made, layer, f"{key}.down.weight", f"{key}.up.weight")
    key = f"text_encoder.text_model.{TEXT}.lora_linear_layer"
    layer = made.text_layer("text_encoder")
    put_named(made, layer, f"{key}.down.weight", f"{key}.up.weight", "text_encoder")
    older = f"text_encoder_2.text_model.{TEXT.replace('q_proj', 'to_q')}_lora"
    layer = made.text_layer("text_encoder_2")
    put_named(made, layer, f"{older}.down.weight", f"{older}.up.weight", "text_encoder_2")


def peft_names(made: Made) -> None:
    for layer in (QUERY, CONV):
        put_peft(made, layer, f"unet.{layer}")


def peft_wrapped(made: Made) -> None:
    put_peft(made, QUERY, f"base_model.model.{QUERY}")


def peft_wrapped_in_unet(made: Made) -> None:
    put_peft(made, QUERY, f"unet.base_model.model.{QUERY}")


def peft_default(made: Made) -> None:
    key = f"unet.{QUERY}.lora"
    put_named(made, QUERY, f"{key}_A.default.weight", f"{key}_B.default.weight")


def comfy_names(made: Made) -> None:
    name = "diffusion_model.input_blocks.3.1.transformer_blocks.0.attn1.to_q"
    put_named(made, QUERY, f"{name}.lora_down.weight", f"{name}.lora_up.weight")
    name = "diffusion_model.input_blocks.3.1.transformer_blocks.0.attn2.to_out.0"
    put_named(made, OUT, f"{name}.lora_A.weight", f"{name}.lora_B.weight")
    name = f"text_encoders.clip_g.transformer.text_model.{TEXT}"
    layer = made.text_layer("text_encoder_2")
    put_named(made, layer, f"{name}.lora_down.weight", f"{name}.lora_up.weight", "text_encoder_2")


def lycoris_names(made: Made) -> None:
    put_kohya(made, QUERY, f"lycoris_{QUERY.replace('.', '_')}")


def _noted(made: Made, **settings: Any) -> None:
    notes = {f"unet.{name}": value for name, value in settings.items()}
    made.header["lora_adapter_metadata"] = json.dumps(notes)


def rank_stabilized(made: Made) -> None:
    put_peft(made, QUERY, f"unet.{QUERY}", alpha=2.0, rank=4, root=True)
    _noted(made, r=4, lora_alpha=2.0, use_rslora=True)


def alpha_of_notes(made: Made) -> None:
    put_peft(made, QUERY, f"unet.{QUERY}", alpha=6.0)
    _noted(made, r=3, lora_alpha=6.0, alpha_pattern={})


def alpha_by_regular_expression(made: Made) -> None:
    put_peft(made, QUERY, f"unet.{QUERY}", alpha=5.0)
    put_peft(made, OUT, f"unet.{OUT}", alpha=2.0)
    _noted(made, r=3, lora_alpha=2.0, alpha_pattern={r"transformer_blocks\.\d+\.attn1\..*": 5.0})


def alpha_by_full_name(made: Made) -> None:
    put_peft(made, QUERY, f"unet.{QUERY}", alpha=5.0)
    put_peft(made, OUT, f"unet.{OUT}", alpha=7.0, rank=2)
    put_peft(made, FEED, f"unet.{FEED}", alpha=2.0)
    patterns = {QUERY: 5.0, f"unet.{OUT}": 7.0, "to_k": 100.0}
    _noted(made, r=3, lora_alpha=2.0, alpha_pattern=patterns, rank_pattern={"attn2.to_out.0": 2})


def peft_bias(made: Made) -> None:
    name = f"unet.{CONV}"
    put_peft(made, CONV, name, alpha=6.0)
    _noted(made, r=3, lora_alpha=6.0, lora_bias=True)
    bias = random(len(made.weight(CONV)))
    made.tensors[f"{name}.lora_B.bias"] = bias
    made.adds_bias(CONV, bias * 2)


def peft_trained_bias(made: Made) -> None:
    name = f"base_model.model.{CONV}"
    put_peft(made, CONV, name)
    bias = random(len(made.weight(CONV)))
    made.tensors[f"{name}.base_layer.bias"] = bias
    made.adds_bias(CONV, bias - made.modules["unet", CONV].bias.detach())


def peft_alpha_keys(made: Made) -> None:
    put_peft(made, QUERY, f"unet.{QUERY}", alpha=6.0)
    made.tensors[f"unet.{QUERY}.alpha"] = torch.tensor(6.0)


def peft_dora(made: Made) -> None:
    for layer in (QUERY, CONV):
        delta = put_peft(made, layer, f"unet.{layer}", alpha=None)
        weight = made.weight(layer)
        lengths = torch.rand(len(weight)) + 0.5
        shaped = lengths if weight.ndim == 2 else lengths.view(1, -1, 1, 1)
        made.tensors[f"unet.{layer}.lora_magnitude_vector"] = shaped
        made.decomposes(layer, delta, lengths, axis=0)


def peft_folder(made: Made) -> None:
    put_peft(made, QUERY, f"base_model.model.{QUERY}", alpha=6.0, rank=4, root=True)
    made.config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6.0, "use_rslora": True}


def onetrainer_original(made: Made) -> None:
    name = "input_blocks.3.1.transformer_blocks.0.attn1.to_q"
    put_peft(made, QUERY, name, alpha=6.0)
    made.tensors[f"{name}.alpha"] = torch.tensor(6.0)


def peft_loha_folder(made: Made) -> None:
    put_loha(made, QUERY, f"base_model.model.{QUERY}", strength=4.0)
    made.config = {"peft_type": "LOHA", "r": 2, "alpha": 8.0}


def peft_lokr_folder(made: Made) -> None:
    delta = put_lokr(made, QUERY, f"base_model.model.{QUERY}")
    del made.tensors[f"base_model.model.{QUERY}.alpha"]
    made.weights.clear()
    made.adds(QUERY, delta * 8 / 2)  # peft scales whole sides too
    made.config = {"peft_type": "LOKR", "r": 2, "alpha": 8.0}
