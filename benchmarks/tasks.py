"""What the training benchmark trains: models, pictures and settings, the same for each side."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image

from rayjobs.starter import components, world

RANK = 16
RATE = 1e-4
PROMPT, CLASS_PROMPT = "a photo of a sks star", "a photo of a star"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Task:
    """What is trained on what, by each side alike."""

    name: str
    model: str
    side: int
    pictures: Path
    """Holds the folders `instance` and `class`."""
    outputs: str


@dataclass(frozen=True)
class Shape:
    """The sizes of a random model."""

    unet: tuple[int, ...]
    heads: tuple[int, ...]
    layers: tuple[int, ...]
    vae: tuple[int, ...]


SHAPES = {
    "narrow": Shape((32, 64, 64), (2, 4, 4), (1, 2, 4), (16, 32, 32, 32)),
    # All of SDXL's layers, each a quarter as wide: its autoencoder's share of the arithmetic.
    "quarter": Shape((80, 160, 320), (5, 10, 20), (1, 2, 10), (32, 64, 128, 128)),
}


class Marks:
    """Moments, on the clock and in CPU time of all threads."""

    def __init__(self) -> None:
        self._times: list[tuple[float, float]] = []

    def add(self) -> None:
        self._times.append((time.perf_counter(), time.process_time()))

    def seconds(self) -> np.ndarray:
        """(marks - 1, 2) seconds between them: wall, CPU."""
        return np.diff(self._times, axis=0)


def draw_pictures(folder: Path, side: int) -> None:
    """Four photographs, twice as large as they are trained at, and eight class images."""
    rng = np.random.default_rng(0)
    for name, number, size in (("instance", 4, 2 * side), ("class", 8, side)):
        (folder / name).mkdir(parents=True)
        for place in range(number):
            picture = world.draw(world.random_scene(rng), rng, size)
            Image.fromarray(picture).save(folder / name / f"{place}.png")


def build_random(folder: Path, shape: Shape) -> str:
    """A model with SDXL's blocks and random weights, below `folder`."""
    tokenizers = [
        components.save_tokenizer(folder / f"tokenizer-{number}", pad)
        for number, pad in enumerate((components.END, "!"))
    ]
    encoders = components.build_text_encoders(tokenizers[0])
    width, blocks = components.TEXT_WIDTH, len(shape.vae)
    torch.manual_seed(0)
    unet: Any = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=shape.unet,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=shape.layers,
        attention_head_dim=shape.heads,
        use_linear_projection=True,
        cross_attention_dim=2 * width,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=width + 6 * 8,
        norm_num_groups=16,
    )
    vae: Any = AutoencoderKL(
        block_out_channels=shape.vae,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=128,
    )
    pipeline: Any = StableDiffusionXLPipeline(
        vae=vae,
        unet=unet,
        text_encoder=encoders[0],
        text_encoder_2=encoders[1],
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        scheduler=components.build_scheduler(),
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder / "model")
    return str(folder / "model")


def prepare(folder: Path, name: str, side: int) -> Task:
    """A model by its name here, and pictures for it, below `folder`."""
    if name == "starter":
        uri, side = "starter", 64
    else:
        uri = build_random(folder, SHAPES[name])
    draw_pictures(folder / "pictures", side)
    return Task(name, uri, side, folder / "pictures", str(folder / "runs"))
