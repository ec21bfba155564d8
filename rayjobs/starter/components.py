"""The starter model's parts before training: a small SDXL, every part of the class SDXL uses.

Owns the sizes and the vocabulary. Knows nothing of training.
"""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    UNet2DConditionModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from rayjobs.starter import world

SIDE = 64
TEXT_WIDTH = 64
TEXT_LAYERS = 3
TIME_ID_WIDTH = 32
START, END = "<|startoftext|>", "<|endoftext|>"

WORDS = [
    *world.COLOURS,
    *world.SHAPES,
    *(shape + "s" for shape in world.SHAPES if shape != "cross"),
    *("crosses", "a", "an", "photo", "of", "on", "background", "picture", "drawing", "the"),
    *("small", "large", "at", "in", "left", "right", "top", "bottom", "striped", "dotted"),
    *("two", "and", "with"),
]


def build_vocabulary(words: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Byte-level CLIP vocabulary and merges in which each of `words` is a single token.

    A word's merges join the pieces that earlier merges leave of it, so no word breaks another.
    Anything else falls apart into letters.
    """
    letters = sorted(ByteLevel.alphabet())
    tokens = letters + [letter + "</w>" for letter in letters]
    merges: list[tuple[str, str]] = []
    for word in words:
        pieces = _split(word, merges)
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
    tokens += [left + right for left, right in merges] + [START, END]
    return {token: number for number, token in enumerate(dict.fromkeys(tokens))}, merges


def _split(word: str, merges: list[tuple[str, str]]) -> list[str]:
    pieces = [*word[:-1], word[-1] + "</w>"]
    for left, right in merges:
        place = 0
        while place < len(pieces) - 1:
            if (pieces[place], pieces[place + 1]) == (left, right):
                pieces[place : place + 2] = [left + right]
            place += 1
    return pieces


def save_tokenizer(folder: Path, pad_token: str) -> CLIPTokenizer:
    """Write a tokenizer as hub models lay it out, which old and new transformers read alike."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary, merges = build_vocabulary(WORDS)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad_token}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2))
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    return CLIPTokenizer.from_pretrained(folder)


def build_text_encoders(
    tokenizer: CLIPTokenizer,
) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    def config(act: str, pad: int) -> CLIPTextConfig:
        return CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=TEXT_LAYERS,
            num_attention_heads=4,
            projection_dim=TEXT_WIDTH,
            max_position_embeddings=77,
            hidden_act=act,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=pad,
        )

    first = CLIPTextModel(config("quick_gelu", tokenizer.eos_token_id))
    return first, CLIPTextModelWithProjection(config("gelu", tokenizer.get_vocab()["!"]))


def build_unet() -> Any:
    return UNet2DConditionModel(
        sample_size=SIDE // 4,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        cross_attention_dim=2 * TEXT_WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_ID_WIDTH,
        projection_class_embeddings_input_dim=TEXT_WIDTH + 6 * TIME_ID_WIDTH,
        norm_num_groups=16,
    )


def build_vae() -> Any:
    return AutoencoderKL(
        block_out_channels=[32, 48, 64],
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=SIDE,
        force_upcast=False,
    )


def build_scheduler() -> Any:
    """SDXL base's own noise schedule and sampler settings."""
    scheduler: Any = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="leading",
        steps_offset=1,
        use_karras_sigmas=False,
    )
    # Not this sampler's own, but DDIM's, which would clip latents as if they were pixels.
    scheduler.register_to_config(clip_sample=False, set_alpha_to_one=False)
    return scheduler


def time_ids(num_rows: int) -> torch.Tensor:
    """SDXL's size conditioning (num_rows, 6) for a whole picture of this world's side."""
    return torch.tensor([[SIDE, SIDE, 0, 0, SIDE, SIDE]], dtype=torch.float32).repeat(num_rows, 1)
