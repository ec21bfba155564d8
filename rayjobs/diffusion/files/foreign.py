"""Files that are no model of the families: which they are, so that a refusal can name it.

Owns the marks by which they are known. Knows nothing of what is accepted.
"""

import re
from collections.abc import Iterable

from rayjobs.diffusion.files.header import Header

ADAPTER = "a LoRA, which goes on top of a model; give it in model.loras"
WORDS = "a file of learned embeddings; give it in model.words"

MARKS = (
    (r"(^|\.)lora_(up|down|unet|te|A|B|mid)|^lora_|\.(hada_w1|lokr_w1)|dora_scale", ADAPTER),
    (r"(^|\.)bundle_emb\.|^emb_params$|^clip_[lg]$|^string_to_param", WORDS),
    (r"^control_model\.|controlnet_(cond_emb|down_b|mid_b)|input_hint_block", "a ControlNet"),
    (r"^(ip_adapter|image_proj)\.", "an IP-Adapter"),
    (r"^adapter\.(body|conv_in)|^body\.\d+\.(block1|resnets)", "a T2I-Adapter"),
    (r"motion_modules\.", "an AnimateDiff motion module"),
    (r"time_stack\.|temporal_transformer_blocks\.|temp_convs\.", "a video model"),
    (r"(^|\.)single_stream_modulation\.|double_stream_modulation_img", "FLUX.2"),
    (r"(^|\.)distilled_guidance_layer\.", "Chroma"),
    (r"(^|\.)individual_token_refiner\.", "HunyuanVideo"),
    (r"(^|\.)double_stream_blocks\.", "HiDream"),
    (r"(^|\.)double_blocks\.\d+\.img_attn|(^|\.)single_transformer_blocks\.", "FLUX"),
    (r"(^|\.)joint_blocks\.\d+\.|context_embedder\.", "Stable Diffusion 3"),
    (r"(^|\.)double_layers\.\d+\.attn", "AuraFlow"),
    (r"(^|\.)img_mod\.|txt_in\.text_norm", "Qwen-Image"),
    (r"(^|\.)cap_embedder\.", "Lumina or Z-Image"),
    (r"(^|\.)patchify_proj\.", "LTX-Video"),
    (r"attn\.qkv_x\.", "Mochi"),
    (r"(^|\.)blocks\.\d+\.cross_attn\.(k|q)\.|(^|\.)head\.modulation$", "Wan"),
    (r"(^|\.)x_embedder\.proj\.1\.", "Cosmos"),
    (r"(^|\.)clip_txt_mapper\.|\.channelwise\.", "Stable Cascade"),
    (r"(^|\.)(adaln_single|caption_projection)\.", "PixArt or Sana"),
    (r"(^|\.)(mlp_t5|extra_embedder)\.", "HunyuanDiT"),
    (r"(^|\.)(noise_augmentor|embedder\.model)\.", "Stable unCLIP"),
    (r"(^|\.)encoder_hid_proj\.", "Kolors"),
    (r"^(conv_first|RDB|RRDB_trunk|model\.1\.sub)\b|^body\.0\.rdb1", "an upscaler of pictures"),
)
"""Patterns of tensors' names, and what a file with one of them is; the first that fits counts."""

PARTS = (
    (r"^model_ema\.", "a file of averaged weights (EMA) under names of their own"),
    (r"^(first_stage_model|vae)\.", "an autoencoder alone"),
    (r"^(encoder|decoder|quant_conv|post_quant_conv)\.", "an autoencoder alone"),
    (r"^(conditioner|cond_stage_model|text_encoders?)\.", "text encoders alone"),
    (r"^(text_model|text_projection|transformer\.text_model|resblocks)\b", "a text encoder alone"),
    (r"^(encoder\.block|shared\.weight)", "a T5 text encoder alone"),
    (r"^(vision_model|visual)\.", "an image encoder alone"),
)
"""Patterns by which files are known that hold one part of a model."""

SCALED = re.compile(
    r"(^|\.)(scaled_fp8|scale_weight|scale_input|weight_scale|input_scale|comfy_quant)$"
)
QUANTIZED = re.compile(r"\.(absmax|quant_map|quant_state\.\w+|SCB|qweight|qzeros|weight_format)$")
COUNTERS = re.compile(r"(position_ids|num_batches_tracked|_step|num_updates|decay|snr|_pred)$")
"""Tensors of whole numbers that are no weights."""


def name_of(names: Iterable[str]) -> str | None:
    """What a file with such tensors is, when it is none of the families'."""
    return _first(MARKS, names)


def part_of(names: Iterable[str]) -> str | None:
    """Which part of a model a file without a UNet is."""
    return _first(PARTS, names)


def quantization(header: Header) -> str | None:
    """Why the numbers are not the weights, such as "scaled fp8"; None where they are."""
    if any(SCALED.search(name) for name in header.names):
        return "fp8 with scales"
    if any(QUANTIZED.search(name) for name in header.names):
        return "quantized"
    whole = {"I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64"}
    for name, tensor in header.tensors.items():
        if tensor.dtype in whole and tensor.size > 1 and not COUNTERS.search(name):
            return f"whole numbers ({tensor.dtype}), which only the program that wrote them reads"
    return None


def _first(table: tuple[tuple[str, str], ...], names: Iterable[str]) -> str | None:
    listed = list(names)
    for pattern, what in table:
        found = re.compile(pattern)
        if any(found.search(name) for name in listed):
            return what
    return None
