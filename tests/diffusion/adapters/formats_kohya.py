"""Adapter files as kohya's scripts, LyCORIS and OneTrainer write them."""

import torch

from tests.diffusion.adapters.made import (
    CONV,
    FEED,
    GROUP,
    NORM,
    OUT,
    QUERY,
    SGM,
    TEXT,
    UP,
    Made,
    kohya,
    product,
    random,
)

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


def loha_of_onetrainer(made: Made) -> None:
    """Factors of a convolution as convolutions."""
    weight, rank, name = made.weight(CONV), 2, kohya(CONV)
    sides = []
    for number in (1, 2):
        a, b = random(len(weight), rank, 1, 1), random(rank, *weight.shape[1:])
        made.tensors |= {f"{name}.hada_w{number}_a": a, f"{name}.hada_w{number}_b": b}
        sides.append(product(b, a))
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


def lokr_whole_of_a_huge_rank(made: Made) -> None:
    """LyCORIS' rank 100000 for whole sides, as alpha, is more than fp16 holds."""
    put_lokr(made, QUERY, kohya(QUERY))
    made.tensors[f"{kohya(QUERY)}.alpha"] = torch.tensor(100_000.0).half()


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
