"""Measures of a picture's pixels: is it blank, how sharp is it, and its hash for near-duplicates.

Owns these measures and the bounds of "looks alike". Knows nothing of models, records or files.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

BLANK_LEVELS = 6
"""Of 256 levels of a channel: what lies within is one shade to the eye, dither included."""
BLANK_SHARE = 0.9999
"""Of the pixels: what is left over is dust, of ten pixels' side at 1024 x 1024."""
SHARPNESS_SIDE = 512
HASH_SIDE = 32
HASH_BITS = 64
CELLS = 3
ALIKE_BITS = 4
"""Of 64: copies that were stored again, resized or got a little noise lie within, pictures of other
things hardly ever. More bits begin to take in other seeds of one prompt on a plain ground."""
ALIKE_LEVELS = 12
"""Of 256: without it, the same figure in two colours would be one, since the hash sees none."""


class Signature(NamedTuple):
    """What is compared of two pictures: 16 hex digits of structure, 54 of colour."""

    phash: str
    colours: str


def measure(image: Image.Image) -> dict[str, Any]:
    """The columns `blank`, `sharpness`, `phash` and `colours` of a picture."""
    rgb, luminance = image.convert("RGB"), image.convert("L")
    return {
        "blank": is_blank(rgb),
        "sharpness": sharpness(luminance),
        "phash": phash(luminance),
        "colours": colours(rgb),
    }


def is_blank(rgb: Image.Image) -> bool:
    """Whether all but dust lies within a few levels of one colour, in every channel."""
    counts = np.array(rgb.histogram()).reshape(3, 256)
    windows = np.lib.stride_tricks.sliding_window_view(counts, BLANK_LEVELS + 1, axis=1)
    fullest = windows.sum(axis=2).max(axis=1)
    return bool((fullest >= BLANK_SHARE * rgb.width * rgb.height).all())


def sharpness(luminance: Image.Image) -> float:
    """Variance of the 4-neighbour Laplacian of the luminance (0..255), with 512 x 512 pixels' area.

    Pictures are first brought to that area, shape kept, so that 512 and 1024 pixels compare; a
    smaller picture is enlarged, and is as sharp as it then looks. The sums are of whole numbers
    and exact, so that every machine gives the same value, which fits a float32.
    """
    scale = SHARPNESS_SIDE / math.sqrt(luminance.width * luminance.height)
    size = [max(3, round(side * scale)) for side in luminance.size]
    if tuple(size) != luminance.size:
        luminance = luminance.resize((size[0], size[1]), Image.Resampling.LANCZOS)
    pixels = np.asarray(luminance).astype(np.int16)
    around = pixels[:-2, 1:-1] + pixels[2:, 1:-1] + pixels[1:-1, :-2] + pixels[1:-1, 2:]
    edges = (around - 4 * pixels[1:-1, 1:-1]).ravel().astype(np.float64)
    mean = float(edges.sum()) / edges.size
    return float(np.float32(float(edges @ edges) / edges.size - mean * mean))


def _dct() -> np.ndarray:
    """The first rows of the type II cosine transform, not normalised, as `scipy.fft.dct` has it."""
    frequency, place = np.mgrid[0:8, 0:HASH_SIDE]
    return 2 * np.cos(np.pi * frequency * (2 * place + 1) / (2 * HASH_SIDE))


_DCT = _dct()


def phash(luminance: Image.Image) -> str:
    """The DCT hash of pHash.org as `imagehash.phash` writes it: 64 bits as 16 hex digits.

    Rounding makes a coefficient that is zero but for the last bits (of a symmetric or flat picture)
    the same on every machine; there imagehash's bits are those of noise, and may differ.
    """
    small = luminance.resize((HASH_SIDE, HASH_SIDE), Image.Resampling.LANCZOS)
    low = np.round(_DCT @ np.asarray(small).astype(np.float64) @ _DCT.T, 6)
    return np.packbits(low > np.median(low)).tobytes().hex()


def colours(rgb: Image.Image) -> str:
    """Mean colours of 3 x 3 cells, row by row, each as the six hex digits that CSS uses."""
    return rgb.resize((CELLS, CELLS), Image.Resampling.BOX).tobytes().hex()
