"""Adapter files as tools write them, each with what its format says of the weights.

A format is a function of a model's layers that returns the file's tensors, its metadata, and for
each layer the changed weight and bias as functions of the scale.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

Changed = Callable[[float], torch.Tensor]

QUERY = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
OUT = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0"
FEED = "up_blocks.0.attentions.0.transformer_blocks.0.ff.net.2"
CONV = "down_blocks.1.resnets.0.conv1"
UP = "up_blocks.0.resnets.1.conv2"
NORM = "down_blocks.1.attentions.0.transformer_blocks.0.norm1"
GROUP = "down_blocks.1.resnets.0.norm1"
TEXT = "encoder.layers.1.self_attn.q_proj"
"""In SDXL's first encoder; transformers has `text_model.` before it in the second."""
SGM = {
    QUERY: "input_blocks_3_1_transformer_blocks_0_attn1_to_q",
    OUT: "input_blocks_3_1_transformer_blocks_0_attn2_to_out_0",
    CONV: "input_blocks_3_0_in_layers_2",
    UP: "output_blocks_1_0_out_layers_3",
    "time_embedding.linear_1": "time_embed_0",
    "add_embedding.linear_2": "label_emb_0_2",
    "conv_in": "input_blocks_0_0",
    "conv_out": "out_2",
    "down_blocks.0.downsamplers.0.conv": "input_blocks_2_0_op",
    "mid_block.resnets.1.time_emb_proj": "middle_block_2_emb_layers_1",
    "up_blocks.0.upsamplers.0.conv": "output_blocks_1_2_conv",
}
"""Layers by their names in the original code, for a UNet of two blocks of one resnet."""


def kohya(name: str) -> str:
    return f"lora_unet_{name.replace('.', '_')}"


@dataclass
class Made:
    """A file, and what it does: weights and biases of (part, layer) at a scale."""

    modules: dict[tuple[str, str], Any]
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    header: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    weights: dict[tuple[str, str], Changed] = field(default_factory=dict)
    biases: dict[tuple[str, str], Changed] = field(default_factory=dict)

    def text_layer(self, part: str) -> str:
        return next(name for of, name in self.modules if of == part and name.endswith(TEXT))

    def weight(self, layer: str, part: str = "unet") -> torch.Tensor:
        return self.modules[part, layer].weight.detach()

    def adds(self, layer: str, delta: torch.Tensor, part: str = "unet") -> None:
        before = self.weights.get((part, layer), lambda _: self.weight(layer, part))
        self.weights[part, layer] = lambda scale: (
            before(scale) + scale * delta.float().reshape(self.weight(layer, part).shape)
        )

    def adds_bias(self, layer: str, delta: torch.Tensor) -> None:
        own = self.modules["unet", layer].bias
        own = torch.zeros(len(delta)) if own is None else own.detach()
        self.biases["unet", layer] = lambda scale: own + scale * delta.float()

    def decomposes(self, layer: str, delta: torch.Tensor, lengths: torch.Tensor, axis: int) -> None:
        """DoRA: rows (axis 0) or columns (axis 1) of W + s D, brought to `lengths`."""
        weight = self.weight(layer)

        def changed(scale: float) -> torch.Tensor:
            whole = weight + scale * delta.view(weight.shape)
            rest = [n for n in range(whole.ndim) if n != axis]
            shape = [-1 if n == axis else 1 for n in range(whole.ndim)]
            return whole / (whole * whole).sum(rest, keepdim=True).sqrt() * lengths.view(shape)

        self.weights["unet", layer] = changed

    def factors(
        self, layer: str, rank: int, part: str = "unet"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        weight = self.weight(layer, part)
        down = random(rank, *weight.shape[1:])
        return down, random(len(weight), rank, *[1] * (weight.ndim - 2))


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape) * 0.3


def product(down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return up.float().flatten(1) @ down.float().flatten(1)


# Low-rank factors, by kohya's names.


def put_kohya(
    made: Made,
    layer: str,
    name: str,
    rank: int = 3,
    alpha: float = 2.0,
    part: str = "unet",
) -> torch.Tensor:
    down, up = made.factors(layer, rank, part)
    made.tensors |= {
        f"{name}.lora_down.weight": down,
        f"{name}.lora_up.weight": up,
        f"{name}.alpha": torch.tensor(alpha, dtype=torch.float32),
    }
    delta = product(down, up) * alpha / rank
    made.adds(layer, delta, part)
    return delta


def kohya_diffusers_names(made: Made) -> None:
    for layer in (QUERY, OUT, FEED):
        put_kohya(made, layer, kohya(layer))


def kohya_sgm_names(made: Made) -> None:
    for layer in (QUERY, OUT):
        put_kohya(made, layer, f"lora_unet_{SGM[layer]}")


def kohya_mixed_names(made: Made) -> None:
    put_kohya(made, QUERY, f"lora_unet_{SGM[QUERY]}")
    put_kohya(made, FEED, kohya(FEED))


def kohya_every_outer_layer(made: Made) -> None:
    for layer, name in SGM.items():
        put_kohya(made, layer, f"lora_unet_{name}")


def kohya_conv(made: Made) -> None:
    put_kohya(made, CONV, kohya(CONV), rank=2, alpha=1)
    put_kohya(made, UP, f"lora_unet_{SGM[UP]}", rank=2, alpha=1)


def kohya_text_encoders(made: Made) -> None:
    name = f"text_model_{TEXT.replace('.', '_')}"
    for number, part in enumerate(("text_encoder", "text_encoder_2"), start=1):
        put_kohya(made, made.text_layer(part), f"lora_te{number}_{name}", part=part)


def kohya_other_ranks(made: Made) -> None:
    put_kohya(made, QUERY, kohya(QUERY), rank=5, alpha=1)
    put_kohya(made, FEED, kohya(FEED), rank=2, alpha=4)


def kohya_without_alpha(made: Made) -> None:
    put_kohya(made, QUERY, kohya(QUERY), rank=3, alpha=3)
    del made.tensors[f"{kohya(QUERY)}.alpha"]


def _in_dtype(made: Made, dtype: torch.dtype) -> None:
    put_kohya(made, QUERY, kohya(QUERY), alpha=3.0)
    keys = [f"{kohya(QUERY)}.lora_{half}.weight" for half in ("down", "up")]
    made.tensors |= {key: made.tensors[key].to(dtype) for key in keys}
    made.weights.clear()
    made.adds(QUERY, product(*(made.tensors[key] for key in keys)))


def kohya_fp16(made: Made) -> None:
    _in_dtype(made, torch.float16)


def kohya_bf16(made: Made) -> None:
    _in_dtype(made, torch.bfloat16)


def kohya_fp8(made: Made) -> None:
    _in_dtype(made, torch.float8_e4m3fn)


def kohya_linear_as_pixels(made: Made) -> None:
    put_kohya(made, QUERY, kohya(QUERY))
    for half in ("down", "up"):
        made.tensors[f"{kohya(QUERY)}.lora_{half}.weight"].unsqueeze_(-1).unsqueeze_(-1)


def locon_tucker(made: Made) -> None:
    weight, rank = made.weight(CONV), 3
    down, up = random(rank, weight.shape[1], 1, 1), random(len(weight), rank, 1, 1)
    mid = random(rank, rank, *weight.shape[2:])
    name = kohya(CONV)
    made.tensors |= {
        f"{name}.lora_down.weight": down,
        f"{name}.lora_mid.weight": mid,
        f"{name}.lora_up.weight": up,
        f"{name}.alpha": torch.tensor(1.0),
    }
    # One convolution after the other.
    delta = torch.einsum("oa,abhw,bi->oihw", up[:, :, 0, 0], mid, down[:, :, 0, 0])
    made.adds(CONV, delta / rank)


def full_difference(made: Made) -> None:
    for layer in (QUERY, CONV):
        delta = random(*made.weight(layer).shape)
        made.tensors[f"{kohya(layer)}.diff"] = delta
        made.adds(layer, delta)
    bias = random(len(made.weight(CONV)))
    made.tensors[f"{kohya(CONV)}.diff_b"] = bias
    made.adds_bias(CONV, bias)


def norm_layers(made: Made) -> None:
    for layer in (NORM, GROUP):
        weight, bias = (random(len(made.weight(layer))) for _ in range(2))
        made.tensors |= {f"{kohya(layer)}.w_norm": weight, f"{kohya(layer)}.b_norm": bias}
        made.adds(layer, weight)
        made.adds_bias(layer, bias)


def bundled_embeddings(made: Made) -> None:
    put_kohya(made, QUERY, kohya(QUERY))
    for encoder in ("clip_l", "clip_g"):
        made.tensors[f"bundle_emb.sks.{encoder}"] = random(2, 32)


# Weight decomposition.


def dora(made: Made) -> None:
    for layer in (QUERY, CONV):
        delta = put_kohya(made, layer, kohya(layer))
        weight = made.weight(layer)
        lengths = torch.rand(len(weight), *[1] * (weight.ndim - 1)) + 0.5
        made.tensors[f"{kohya(layer)}.dora_scale"] = lengths
        made.decomposes(layer, delta, lengths, axis=0)


def dora_of_columns(made: Made) -> None:
    for layer in (FEED, UP):
        delta = put_kohya(made, layer, kohya(layer))
        weight = made.weight(layer)
        lengths = torch.rand(1, weight.shape[1], *[1] * (weight.ndim - 2)) + 0.5
        made.tensors[f"{kohya(layer)}.dora_scale"] = lengths
        made.decomposes(layer, delta, lengths, axis=1)


def peft_dora(made: Made) -> None:
    for layer in (QUERY, CONV):
        delta = put_peft(made, layer, f"unet.{layer}", alpha=None)
        weight = made.weight(layer)
        lengths = torch.rand(len(weight)) + 0.5
        shaped = lengths if weight.ndim == 2 else lengths.view(1, -1, 1, 1)
        made.tensors[f"unet.{layer}.lora_magnitude_vector"] = shaped
        made.decomposes(layer, delta, lengths, axis=0)


# Hadamard and Kronecker products.


def put_loha(made: Made, layer: str, name: str, strength: float = 0.5, rank: int = 2) -> None:
    weight = made.weight(layer).flatten(1)
    sides = [(random(len(weight), rank), random(rank, weight.shape[1])) for _ in range(2)]
    for number, (a, b) in enumerate(sides, start=1):
        made.tensors |= {f"{name}.hada_w{number}_a": a, f"{name}.hada_w{number}_b": b}
    (a1, b1), (a2, b2) = sides
    made.adds(layer, (a1 @ b1) * (a2 @ b2) * strength)


def loha(made: Made) -> None:
    for layer in (QUERY, CONV):
        put_loha(made, layer, kohya(layer))
        made.tensors[f"{kohya(layer)}.alpha"] = torch.tensor(1.0)


def loha_tucker(made: Made) -> None:
    weight, rank, name = made.weight(CONV), 2, kohya(CONV)
    sides = []
    for number in (1, 2):
        core = random(rank, rank, *weight.shape[2:])
        a, b = random(rank, len(weight)), random(rank, weight.shape[1])
        keys = (f"hada_t{number}", f"hada_w{number}_a", f"hada_w{number}_b")
        made.tensors |= {f"{name}.{k}": t for k, t in zip(keys, (core, a, b), strict=True)}
        sides.append(torch.einsum("rshw,ro,si->oihw", core, a, b))
    made.tensors[f"{name}.alpha"] = torch.tensor(1.0)
    made.adds(CONV, sides[0] * sides[1] / rank)


def loha_dora(made: Made) -> None:
    put_loha(made, QUERY, kohya(QUERY), strength=1.0)
    weight = made.weight(QUERY)
    delta = made.weights["unet", QUERY](1.0) - weight
    lengths = torch.rand(len(weight), 1) + 0.5
    made.tensors[f"{kohya(QUERY)}.dora_scale"] = lengths
    made.decomposes(QUERY, delta, lengths, axis=0)


def put_lokr(
    made: Made,
    layer: str,
    name: str,
    factored: tuple[bool, bool] = (False, False),
    alpha: float = 1.0,
) -> torch.Tensor:
    """A Kronecker product of (4, 4) and the rest, either side perhaps of rank 2."""
    weight, rank = made.weight(layer), 2
    num_out, num_in, *kernel = weight.shape
    divisor = 4
    size = torch.Size(kernel).numel()
    shapes = ((divisor, divisor), (num_out // divisor, num_in // divisor * size))
    sides = []
    for number, (shape, is_factored) in enumerate(zip(shapes, factored, strict=True), start=1):
        if is_factored:
            a, b = random(shape[0], rank), random(rank, shape[1])
            made.tensors |= {f"{name}.lokr_w{number}_a": a, f"{name}.lokr_w{number}_b": b}
            sides.append(a @ b)
        else:
            side = random(*shape)
            shaped = side if number == 1 else side.view(shape[0], -1, *kernel)
            made.tensors[f"{name}.lokr_w{number}"] = shaped
            sides.append(side)
    made.tensors[f"{name}.alpha"] = torch.tensor(alpha)
    strength = alpha / rank if any(factored) else 1.0
    delta = torch.kron(*sides) * strength
    made.adds(layer, delta)
    return delta


def lokr(made: Made) -> None:
    for layer in (QUERY, CONV):
        put_lokr(made, layer, kohya(layer), alpha=9)  # whole sides have no scale


def lokr_factored(made: Made) -> None:
    put_lokr(made, QUERY, kohya(QUERY), (False, True))
    put_lokr(made, CONV, kohya(CONV), (False, True))


def lokr_both_factored(made: Made) -> None:
    put_lokr(made, QUERY, kohya(QUERY), (True, True))


def lokr_left_factored(made: Made) -> None:
    put_lokr(made, FEED, kohya(FEED), (True, False))


def lokr_flat(made: Made) -> None:
    put_lokr(made, CONV, kohya(CONV))
    key = f"{kohya(CONV)}.lokr_w2"
    made.tensors[key] = made.tensors[key].flatten(1)


def lokr_across_the_kernel(made: Made) -> None:
    """Divided by 3 although no number of channels is, as tools that factor I k k do."""
    weight, name = made.weight(CONV), kohya(CONV)
    left, right = random(2, 3), random(len(weight) // 2, weight[0].numel() // 3)
    made.tensors |= {f"{name}.lokr_w1": left, f"{name}.lokr_w2": right}
    made.adds(CONV, torch.kron(left, right))


def lokr_tucker(made: Made) -> None:
    weight, rank, divisor, name = made.weight(CONV), 2, 4, kohya(CONV)
    left, core = random(divisor, divisor), random(rank, rank, *weight.shape[2:])
    a, b = random(rank, len(weight) // divisor), random(rank, weight.shape[1] // divisor)
    made.tensors |= {
        f"{name}.lokr_w1": left,
        f"{name}.lokr_t2": core,
        f"{name}.lokr_w2_a": a,
        f"{name}.lokr_w2_b": b,
        f"{name}.alpha": torch.tensor(1.0),
    }
    right = torch.einsum("rshw,ro,si->oihw", core, a, b).contiguous()
    made.adds(CONV, torch.kron(left[:, :, None, None], right) / rank)


def lokr_beside_lora(made: Made) -> None:
    put_lokr(made, QUERY, kohya(QUERY))
    put_kohya(made, FEED, kohya(FEED))


def lokr_and_lora_of_one_layer(made: Made) -> None:
    put_lokr(made, QUERY, kohya(QUERY))
    put_kohya(made, QUERY, kohya(QUERY), alpha=1.0)


def lokr_dora(made: Made) -> None:
    delta = put_lokr(made, QUERY, kohya(QUERY), (False, True))
    lengths = torch.rand(len(made.weight(QUERY)), 1) + 0.5
    made.tensors[f"{kohya(QUERY)}.dora_scale"] = lengths
    made.decomposes(QUERY, delta, lengths, axis=0)


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


def peft_folder(made: Made) -> None:
    put_peft(made, QUERY, f"base_model.model.{QUERY}", alpha=6.0, rank=4, root=True)
    made.config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6.0, "use_rslora": True}


def peft_loha_folder(made: Made) -> None:
    put_loha(made, QUERY, f"base_model.model.{QUERY}", strength=4.0)
    made.config = {"peft_type": "LOHA", "r": 2, "alpha": 8.0}


def peft_lokr_folder(made: Made) -> None:
    delta = put_lokr(made, QUERY, f"base_model.model.{QUERY}")
    del made.tensors[f"base_model.model.{QUERY}.alpha"]
    made.weights.clear()
    made.adds(QUERY, delta * 8 / 2)  # peft scales whole sides too
    made.config = {"peft_type": "LOKR", "r": 2, "alpha": 8.0}


FORMATS: list[Callable[[Made], None]] = [
    made
    for name, made in list(globals().items())
    if callable(made)
    and getattr(made, "__module__", "") == __name__
    and not name.startswith(("_", "put_"))
    and name not in ("Made", "kohya", "random", "product")
]


def merged(module: Any, weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor) -> Any:
    """What a layer gives for `x` with another weight and bias."""
    if isinstance(module, torch.nn.Conv2d):
        return F.conv2d(x, weight, bias, module.stride, module.padding)
    if isinstance(module, torch.nn.GroupNorm):
        return F.group_norm(x, module.num_groups, weight, bias, module.eps)
    if isinstance(module, torch.nn.LayerNorm):
        return F.layer_norm(x, module.normalized_shape, weight, bias, module.eps)
    return F.linear(x, weight, bias)
