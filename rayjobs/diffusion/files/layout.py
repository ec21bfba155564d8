"""The tensors that a part's configuration asks for, by name, without building the part.

Owns the layouts of diffusers' UNet and autoencoder and of transformers' CLIP text model, as far as
models of the families have them. A test compares them with the modules themselves. Knows no file.
"""

from collections.abc import Iterator, Mapping
from typing import Any

Config = Mapping[str, Any]

RESNET = ("norm1", "conv1", "norm2", "conv2")
ATTENTION = ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight", "to_out.0.bias")
UNUSUAL = ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type", "encoder_hid_dim")
UNUSUAL += ("dual_cross_attention", "only_cross_attention", "reverse_transformer_layers_per_block")
MIDDLE = "UNetMidBlock2DCrossAttn"
PLAIN_BLOCKS = {"DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"}


def unet(config: Config) -> set[str] | None:
    """Of a UNet2DConditionModel; None for a configuration that is beyond this module."""
    channels, depths = config.get("block_out_channels") or (), _depths(config)
    if depths is None:
        return None
    outer = ["time_embedding.linear_1", "time_embedding.linear_2", "conv_in", "conv_out"]
    outer.append("conv_norm_out")
    if config.get("addition_embed_type") == "text_time":
        outer += ["add_embedding.linear_1", "add_embedding.linear_2"]
    names = {*_both(outer), *_middle(config, depths[-1])}
    if config.get("time_cond_proj_dim") is not None:
        names.add("time_embedding.cond_proj.weight")
    last, layers = len(channels) - 1, config.get("layers_per_block", 2)
    for n, kind in enumerate(config["down_block_types"]):
        widens = channels[max(n - 1, 0)] != channels[n]
        names.update(_block(f"down_blocks.{n}", kind, depths[n], [widens] + [False] * (layers - 1)))
        if n < last:
            names.update(_both([f"down_blocks.{n}.downsamplers.0.conv"]))
    for n, kind in enumerate(config["up_block_types"]):
        names.update(_block(f"up_blocks.{n}", kind, depths[last - n], [True] * (layers + 1)))
        if n < last:
            names.update(_both([f"up_blocks.{n}.upsamplers.0.conv"]))
    return names


def vae(config: Config) -> set[str] | None:
    """Of an AutoencoderKL; None for a configuration that is beyond this module."""
    channels, layers = config.get("block_out_channels") or (), config.get("layers_per_block", 1)
    kinds = {*config.get("down_block_types", ()), *config.get("up_block_types", ())}
    if not kinds <= {"DownEncoderBlock2D", "UpDecoderBlock2D"} or not channels:
        return None
    names = {name for name in ("quant_conv", "post_quant_conv") if config.get(f"use_{name}", True)}
    attention = config.get("mid_block_add_attention", True)
    for half, blocks, scaler, order, num in (
        ("encoder", "down_blocks", "downsamplers", channels, layers),
        ("decoder", "up_blocks", "upsamplers", channels[::-1], layers + 1),
    ):
        names.update(f"{half}.{end}" for end in ("conv_in", "conv_out", "conv_norm_out"))
        names.update(_vae_middle(f"{half}.mid_block", attention))
        for n in range(len(order)):
            resnets = [f"{half}.{blocks}.{n}.resnets.{layer}" for layer in range(num)]
            names.update(f"{resnet}.{part}" for resnet in resnets for part in RESNET)
            if order[max(n - 1, 0)] != order[n]:
                names.add(f"{resnets[0]}.conv_shortcut")
            if n < len(order) - 1:
                names.add(f"{half}.{blocks}.{n}.{scaler}.0.conv")
    return set(_both(names))


def text_encoder(config: Config) -> set[str]:
    """Of a CLIP text model, without the projection that some have."""
    names = {"final_layer_norm"}
    for n in range(int(config.get("num_hidden_layers", 12))):
        layer = f"encoder.layers.{n}"
        names.update(f"{layer}.self_attn.{each}_proj" for each in ("q", "k", "v", "out"))
        names.update(f"{layer}.{each}" for each in ("layer_norm1", "layer_norm2"))
        names.update(f"{layer}.mlp.{each}" for each in ("fc1", "fc2"))
    return {
        "embeddings.token_embedding.weight",
        "embeddings.position_embedding.weight",
        *_both(names),
    }


def _depths(config: Config) -> list[int] | None:
    """Transformer layers of each level; None for a configuration with other kinds of blocks."""
    downs, ups = config.get("down_block_types") or (), config.get("up_block_types") or ()
    depths, levels = config.get("transformer_layers_per_block", 1), len(downs)
    depths = [depths] * levels if isinstance(depths, int) else list(depths)
    plain = (
        {*downs, *ups} <= PLAIN_BLOCKS
        and not any(config.get(key) for key in UNUSUAL)
        and config.get("addition_embed_type") in (None, "text_time")
        and config.get("attention_type", "default") == "default"
        and config.get("mid_block_type", MIDDLE) in (MIDDLE, "UNetMidBlock2D")
        and isinstance(config.get("layers_per_block", 2), int)
        and all(isinstance(depth, int) for depth in depths)
        and levels == len(ups) == len(depths) == len(config.get("block_out_channels") or ()) > 0
    )
    return depths if plain else None


def _middle(config: Config, depth: int) -> Iterator[str]:
    yield from _resnet("mid_block.resnets.0", False)
    if config.get("mid_block_type", MIDDLE) == MIDDLE:
        yield from _resnet("mid_block.resnets.1", False)
        yield from _transformer("mid_block.attentions.0", depth)


def _block(prefix: str, kind: str, depth: int, shortcuts: list[bool]) -> Iterator[str]:
    for layer, shortcut in enumerate(shortcuts):
        yield from _resnet(f"{prefix}.resnets.{layer}", shortcut)
        if kind.startswith("CrossAttn"):
            yield from _transformer(f"{prefix}.attentions.{layer}", depth)


def _vae_middle(prefix: str, attention: bool) -> Iterator[str]:
    yield from (f"{prefix}.resnets.{n}.{part}" for n in range(2) for part in RESNET)
    if attention:
        parts = ("group_norm", "to_q", "to_k", "to_v", "to_out.0")
        yield from (f"{prefix}.attentions.0.{part}" for part in parts)


def _resnet(prefix: str, shortcut: bool) -> Iterator[str]:
    yield from _both(f"{prefix}.{part}" for part in (*RESNET, "time_emb_proj"))
    if shortcut:
        yield from _both([f"{prefix}.conv_shortcut"])


def _transformer(prefix: str, depth: int) -> Iterator[str]:
    yield from _both(f"{prefix}.{part}" for part in ("norm", "proj_in", "proj_out"))
    for n in range(depth):
        block = f"{prefix}.transformer_blocks.{n}"
        parts = ("norm1", "norm2", "norm3", "ff.net.0.proj", "ff.net.2")
        yield from _both(f"{block}.{part}" for part in parts)
        yield from (f"{block}.attn{k}.{part}" for k in (1, 2) for part in ATTENTION)


def _both(names: Any) -> Iterator[str]:
    for name in names:
        yield f"{name}.weight"
        yield f"{name}.bias"
