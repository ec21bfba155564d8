"""The tensors that a part's configuration asks for, names and shapes, without building the part.

Owns the layouts of diffusers' UNet and autoencoder and of transformers' CLIP text model, as far as
models of the families have them. A test compares them with the modules themselves. Knows no file.
Legend: C channels, T width of the time embedding, D width of the texts.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

Config = Mapping[str, Any]
Shape = tuple[int, ...]
Named = Iterator[tuple[str, Shape]]

UNUSUAL = ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type", "encoder_hid_dim")
UNUSUAL += ("dual_cross_attention", "only_cross_attention", "reverse_transformer_layers_per_block")
UNUSUAL += ("time_embedding_dim", "resnet_skip_time_act", "cross_attention_norm")
MIDDLE = "UNetMidBlock2DCrossAttn"
PLAIN_BLOCKS = {"DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"}


class _Widths(NamedTuple):
    """What all blocks of a UNet have in common."""

    time: int
    text: int
    is_linear: bool
    """Whether projections around attentions are linear layers, not convolutions of a pixel."""


def unet(config: Config) -> dict[str, Shape] | None:
    """Of a UNet2DConditionModel; None for a configuration that is beyond this module."""
    depths = _depths(config)
    return None if depths is None else dict(_unet(config, depths))


def vae(config: Config) -> dict[str, Shape] | None:
    """Of an AutoencoderKL; None for a configuration that is beyond this module."""
    kinds = {*config.get("down_block_types", ()), *config.get("up_block_types", ())}
    plain = kinds <= {"DownEncoderBlock2D", "UpDecoderBlock2D"}
    return dict(_vae(config)) if plain and config.get("block_out_channels") else None


def text_encoder(config: Config) -> dict[str, Shape]:
    """Of a CLIP text model, the projection that some have included."""
    width, inner = int(config.get("hidden_size", 512)), int(config.get("intermediate_size", 2048))
    vocabulary, places = config.get("vocab_size", 49408), config.get("max_position_embeddings", 77)
    named: dict[str, Shape] = {
        "embeddings.token_embedding.weight": (int(vocabulary), width),
        "embeddings.position_embedding.weight": (int(places), width),
        "text_projection.weight": (int(config.get("projection_dim", 512)), width),
        **dict(_norm("final_layer_norm", width)),
    }
    for n in range(int(config.get("num_hidden_layers", 12))):
        layer = f"encoder.layers.{n}"
        for each in ("q", "k", "v", "out"):
            named |= _layer(f"{layer}.self_attn.{each}_proj", width, width)
        named |= _layer(f"{layer}.mlp.fc1", inner, width)
        named |= _layer(f"{layer}.mlp.fc2", width, inner)
        named |= dict(_norm(f"{layer}.layer_norm1", width))
        named |= dict(_norm(f"{layer}.layer_norm2", width))
    return named


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
        and config.get("resnet_time_scale_shift", "default") == "default"
        and config.get("time_embedding_type", "positional") == "positional"
        and config.get("mid_block_type", MIDDLE) in (MIDDLE, "UNetMidBlock2D")
        and isinstance(config.get("layers_per_block", 2), int)
        and isinstance(config.get("cross_attention_dim", 1280), int)
        and all(isinstance(depth, int) for depth in depths)
        and levels == len(ups) == len(depths) == len(config.get("block_out_channels") or ()) > 0
    )
    return depths if plain else None


def _unet(config: Config, depths: list[int]) -> Named:
    channels, layers = list(config["block_out_channels"]), config.get("layers_per_block", 2)
    first, last, levels = channels[0], channels[-1], len(channels)
    widths = _Widths(
        4 * first,
        config.get("cross_attention_dim", 1280),
        bool(config.get("use_linear_projection", False)),
    )
    yield from _conv(
        "conv_in", first, config.get("in_channels", 4), config.get("conv_in_kernel", 3)
    )
    yield from _conv(
        "conv_out", config.get("out_channels", 4), first, config.get("conv_out_kernel", 3)
    )
    yield from _norm("conv_norm_out", first)
    yield from _embedding("time_embedding", widths.time, first)
    if config.get("addition_embed_type") == "text_time":
        size = config.get("projection_class_embeddings_input_dim") or 0
        yield from _embedding("add_embedding", widths.time, size)
    if config.get("time_cond_proj_dim") is not None:
        yield "time_embedding.cond_proj.weight", (first, config["time_cond_proj_dim"])
    for n, kind in enumerate(config["down_block_types"]):
        inputs = [channels[max(n - 1, 0)], *[channels[n]] * (layers - 1)]
        yield from _block(f"down_blocks.{n}", kind, depths[n], inputs, channels[n], widths)
        if n < levels - 1:
            yield from _conv(f"down_blocks.{n}.downsamplers.0.conv", channels[n], channels[n])
    yield from _resnet("mid_block.resnets.0", last, last, widths.time)
    if config.get("mid_block_type", MIDDLE) == MIDDLE:
        yield from _resnet("mid_block.resnets.1", last, last, widths.time)
        yield from _transformer("mid_block.attentions.0", depths[-1], last, widths)
    back = channels[::-1]
    for n, kind in enumerate(config["up_block_types"]):
        mine, before, after = back[n], back[max(n - 1, 0)], back[min(n + 1, levels - 1)]
        skips = [*[mine] * layers, after]
        inputs = [
            given + skip for given, skip in zip([before, *[mine] * layers], skips, strict=True)
        ]
        yield from _block(f"up_blocks.{n}", kind, depths[levels - 1 - n], inputs, mine, widths)
        if n < levels - 1:
            yield from _conv(f"up_blocks.{n}.upsamplers.0.conv", mine, mine)


def _block(
    prefix: str, kind: str, depth: int, inputs: list[int], size: int, widths: _Widths
) -> Named:
    for layer, given in enumerate(inputs):
        yield from _resnet(f"{prefix}.resnets.{layer}", given, size, widths.time)
        if kind.startswith("CrossAttn"):
            yield from _transformer(f"{prefix}.attentions.{layer}", depth, size, widths)


def _resnet(prefix: str, given: int, size: int, time: int | None) -> Named:
    yield from _norm(f"{prefix}.norm1", given)
    yield from _conv(f"{prefix}.conv1", size, given)
    yield from _norm(f"{prefix}.norm2", size)
    yield from _conv(f"{prefix}.conv2", size, size)
    if time is not None:
        yield from _layer(f"{prefix}.time_emb_proj", size, time).items()
    if given != size:
        yield from _conv(f"{prefix}.conv_shortcut", size, given, 1)


def _transformer(prefix: str, depth: int, size: int, widths: _Widths) -> Named:
    yield from _norm(f"{prefix}.norm", size)
    for end in ("proj_in", "proj_out"):
        if widths.is_linear:
            yield from _layer(f"{prefix}.{end}", size, size).items()
        else:
            yield from _conv(f"{prefix}.{end}", size, size, 1)
    for n in range(depth):
        block = f"{prefix}.transformer_blocks.{n}"
        for number in (1, 2, 3):
            yield from _norm(f"{block}.norm{number}", size)
        yield from _layer(f"{block}.ff.net.0.proj", 8 * size, size).items()
        yield from _layer(f"{block}.ff.net.2", size, 4 * size).items()
        for name, reads in (("attn1", size), ("attn2", widths.text)):
            yield f"{block}.{name}.to_q.weight", (size, size)
            yield f"{block}.{name}.to_k.weight", (size, reads)
            yield f"{block}.{name}.to_v.weight", (size, reads)
            yield from _layer(f"{block}.{name}.to_out.0", size, size).items()


def _vae(config: Config) -> Named:
    channels, layers = list(config["block_out_channels"]), config.get("layers_per_block", 1)
    latents, last = config.get("latent_channels", 4), channels[-1]
    if config.get("use_quant_conv", True):
        yield from _conv("quant_conv", 2 * latents, 2 * latents, 1)
    if config.get("use_post_quant_conv", True):
        yield from _conv("post_quant_conv", latents, latents, 1)
    for half, blocks, scaler, order, num in (
        ("encoder", "down_blocks", "downsamplers", channels, layers),
        ("decoder", "up_blocks", "upsamplers", channels[::-1], layers + 1),
    ):
        given = config.get("in_channels", 3) if half == "encoder" else latents
        made = 2 * latents if half == "encoder" else config.get("out_channels", 3)
        yield from _conv(f"{half}.conv_in", order[0], given)
        yield from _norm(f"{half}.conv_norm_out", order[-1])
        yield from _conv(f"{half}.conv_out", made, order[-1])
        yield from _vae_middle(
            f"{half}.mid_block", last, config.get("mid_block_add_attention", True)
        )
        for n, size in enumerate(order):
            inputs = [order[max(n - 1, 0)], *[size] * (num - 1)]
            for layer, each in enumerate(inputs):
                yield from _resnet(f"{half}.{blocks}.{n}.resnets.{layer}", each, size, None)
            if n < len(order) - 1:
                yield from _conv(f"{half}.{blocks}.{n}.{scaler}.0.conv", size, size)


def _vae_middle(prefix: str, size: int, attention: bool) -> Named:
    for n in range(2):
        yield from _resnet(f"{prefix}.resnets.{n}", size, size, None)
    if attention:
        yield from _norm(f"{prefix}.attentions.0.group_norm", size)
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            yield from _layer(f"{prefix}.attentions.0.{part}", size, size).items()


def _embedding(prefix: str, size: int, given: int) -> Named:
    yield from _layer(f"{prefix}.linear_1", size, given).items()
    yield from _layer(f"{prefix}.linear_2", size, size).items()


def _conv(name: str, size: int, given: int, kernel: int = 3) -> Named:
    yield f"{name}.weight", (size, given, kernel, kernel)
    yield f"{name}.bias", (size,)


def _norm(name: str, size: int) -> Named:
    yield f"{name}.weight", (size,)
    yield f"{name}.bias", (size,)


def _layer(name: str, size: int, given: int) -> dict[str, Shape]:
    """A linear layer's."""
    return {f"{name}.weight": (size, given), f"{name}.bias": (size,)}
