"""The memory that a job takes on a GPU, by arithmetic on parameters and measured figures.

Owns the figures, of docs/guides/sizing.md, and what they are multiplied by. It is a lower bound:
adapters, scorers, CUDA's own libraries and what torch keeps between calls come on top.
"""

from collections.abc import Mapping
from dataclasses import dataclass

GIB = 2**30
ENTRY_GIB = 0.154
"""Of a UNet batch entry of 1024 x 1024 pixels, in two bytes a number."""
DECODE_GIB = 1.75
"""Of decoding such a picture."""
USUAL_PIXELS = 1024 * 1024
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "auto": 2}
"""Of a number; `auto` as it is on a GPU."""
MOMENTS = {"adamw": 8, "adamw8bit": 2, "adafactor": 0, "prodigy": 16}
"""Bytes that an optimizer keeps of each trained number."""


@dataclass(frozen=True)
class Need:
    """GiB of one worker, by what takes them."""

    weights: float
    calls: float
    decoding: float

    @property
    def total(self) -> float:
        return self.weights + max(self.calls, self.decoding)

    def __str__(self) -> str:
        parts = f"weights {self.weights:.1f}, UNet calls {self.calls:.1f}"
        return f"{self.total:.1f} GiB ({parts}, decoding {self.decoding:.1f})"


def of_drawing(
    parameters: Mapping[str, int], dtypes: tuple[str, str], entries: int, pixels: tuple[int, int]
) -> Need:
    """Of a worker that makes pictures, in `entries` of a UNet call: with guidance two for each.

    `dtypes` and `pixels` are those of the UNet and of the autoencoder, which may work in tiles.
    """
    size = BYTES[dtypes[0]]
    vae_size = size if dtypes[1] == "auto" else BYTES[dtypes[1]]
    numbers = (parameters["unet"] + parameters["text"]) * size + parameters["vae"] * vae_size
    scale, tile = (each / USUAL_PIXELS for each in pixels)
    calls = entries * ENTRY_GIB * scale * size / 2
    return Need(numbers / GIB, calls, DECODE_GIB * tile * vae_size / 2)


def of_training(parameters: Mapping[str, int], optimizer: str, fused: bool, shards: int) -> Need:
    """Of a trainer of the whole UNet: its numbers in float32, their gradients and moments.

    They are divided among `shards` workers; `fused` keeps no gradients. Activations are not in it.
    """
    each = 4 + (0 if fused else 4) + MOMENTS[optimizer]
    return Need(parameters["unet"] * each / shards / GIB, 0.0, 0.0)


def of_lora(parameters: Mapping[str, int], precision: str) -> Need:
    """Of a trainer of a LoRA: the frozen UNet."""
    return Need(parameters["unet"] * (4 if precision == "fp32" else 2) / GIB, 0.0, 0.0)
