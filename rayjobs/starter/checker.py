"""Does a picture show what its caption says? Judged from pixels alone, by no model.

Owns the reading of a picture: the ground's colour, the figure's colour, and the figure's shape by
matching against rendered references. Knows the world's words, and nothing of models.
"""

import re
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from rayjobs.starter import world

REFERENCE_SIDE = 40
MATCH = 0.8
ROTATIONS_DEG = range(-18, 19, 6)
PLAIN = re.compile(r"an? (\w+) (\w+) on an? (\w+) background")


@dataclass(frozen=True)
class Reading:
    """What a picture shows; `shape` is empty when there is no figure."""

    colour: str
    shape: str
    ground: str


def read(picture: np.ndarray) -> Reading:
    """Read a picture (H, W, 3) uint8 with a single plain figure on a plain ground."""
    x = picture.astype(np.float32)
    seen, ground_name = figure(picture), _nearest_colour(_ground(x))
    if seen.sum() < 0.01 * seen.size:
        return Reading("", "", ground_name)
    inside = _eroded(seen)
    colour = np.median(x[inside if inside.any() else seen], axis=0)
    return Reading(_nearest_colour(colour), nearest_shape(seen), ground_name)


def figure(picture: np.ndarray, threshold: float | None = None) -> np.ndarray:
    """Where (H, W) bool the figure is: the largest piece that differs from the ground.

    Without a threshold, in CIE L*a*b*, it is half of the largest difference: right for one colour.
    """
    x = picture.astype(np.float32)
    away = np.linalg.norm(perceptual(x) - perceptual(_ground(x)), axis=-1)
    if threshold is None:
        threshold = max(20.0, float(np.percentile(away, 99)) / 2)
    return _largest_piece(away > threshold)


def distance(rgb: ArrayLike, other: ArrayLike) -> float:
    """How far two sRGB colours are apart in CIE L*a*b*."""
    return float(np.linalg.norm(perceptual(np.asarray(rgb)) - perceptual(np.asarray(other))))


def _ground(x: np.ndarray) -> np.ndarray:
    """The colour (3,) of a picture's border."""
    return np.median(np.concatenate([x[0], x[-1], x[:, 0], x[:, -1]]), axis=0)


def matches(picture: np.ndarray, caption: str) -> bool:
    """Whether the picture shows all that a caption of the plain grammar says.

    Raises ValueError for a caption that is not "... a COLOUR SHAPE on a COLOUR background".
    """
    found = PLAIN.search(caption)
    if found is None:
        raise ValueError(f"caption {caption!r} is not of the plain grammar")
    return read(picture) == Reading(*found.groups())


def follows(picture: np.ndarray, cover: np.ndarray) -> bool:
    """Whether the figure of a picture (H, W, 3) lies where `cover` (H, W) in 0..1 says: what both
    take up is at least MATCH of what either does."""
    seen, wanted = figure(picture), cover > 0.5
    return bool((seen & wanted).sum() >= MATCH * (seen | wanted).sum())


def perceptual(rgb: np.ndarray) -> np.ndarray:
    """CIE L*a*b* of sRGB in 0..255 (CIE 15:2004), in which distances are about as people see."""
    linear = np.asarray(rgb, np.float32) / 255
    linear = np.where(linear > 0.04045, ((linear + 0.055) / 1.055) ** 2.4, linear / 12.92)
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]], np.float32
    )
    xyz = linear @ to_xyz.T / np.array([0.9505, 1.0, 1.089], np.float32)
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    lightness, a, b = 116 * f[..., 1] - 16, f[..., 0] - f[..., 1], f[..., 1] - f[..., 2]
    return np.stack([lightness, 500 * a, 200 * b], axis=-1)


def _nearest_colour(rgb: np.ndarray) -> str:
    names = list(world.COLOURS)
    palette = perceptual(np.array([world.COLOURS[name] for name in names]))
    return names[int(np.linalg.norm(palette - perceptual(rgb), axis=-1).argmin())]


def nearest_shape(mask: np.ndarray) -> str:
    """The shape whose rendered reference overlaps a figure's mask best, over a few rotations."""
    seen = _normalised(mask.astype(np.float32))
    names, references = _references()
    overlap = np.minimum(references, seen).sum((1, 2)) / np.maximum(references, seen).sum((1, 2))
    return names[int(overlap.argmax())]


@lru_cache(maxsize=1)
def _references() -> tuple[list[str], np.ndarray]:
    names, masks = [], []
    for shape in world.SHAPES:
        for rotation in ROTATIONS_DEG:
            mask = world.figure_mask(shape, 64, (0.5, 0.5), 0.34, rotation)
            names.append(shape)
            masks.append(_normalised(mask))
    return names, np.stack(masks)


def _normalised(mask: np.ndarray) -> np.ndarray:
    """The mask's bounding box, scaled evenly into a square of REFERENCE_SIDE."""
    rows, columns = np.where(mask.max(1) > 0.5)[0], np.where(mask.max(0) > 0.5)[0]
    cut = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    side = max(cut.shape)
    square = np.zeros((side, side), np.float32)
    top, left = (side - cut.shape[0]) // 2, (side - cut.shape[1]) // 2
    square[top : top + cut.shape[0], left : left + cut.shape[1]] = cut
    picture = Image.fromarray((square * 255).astype(np.uint8))
    scaled = picture.resize((REFERENCE_SIDE, REFERENCE_SIDE), Image.Resampling.BILINEAR)
    return np.asarray(scaled, np.float32) / 255


def _largest_piece(mask: np.ndarray) -> np.ndarray:
    """The mask's largest 4-connected piece, so that a stray speck does not widen the figure."""
    left, best = mask.copy(), np.zeros_like(mask)
    while left.any():
        piece = np.zeros_like(mask)
        piece[tuple(np.argwhere(left)[0])] = True
        while True:
            grown = piece.copy()
            grown[1:] |= piece[:-1]
            grown[:-1] |= piece[1:]
            grown[:, 1:] |= piece[:, :-1]
            grown[:, :-1] |= piece[:, 1:]
            grown &= mask
            if (grown == piece).all():
                break
            piece = grown
        best = piece if piece.sum() > best.sum() else best
        left &= ~piece
    return best


def _eroded(mask: np.ndarray) -> np.ndarray:
    """The mask without its rim of two pixels, where figure and ground mix."""
    for _ in range(2):
        inner = np.pad(mask, 1)
        mask = mask & inner[2:, 1:-1] & inner[:-2, 1:-1] & inner[1:-1, 2:] & inner[1:-1, :-2]
    return mask
