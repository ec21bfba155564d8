"""An invisible watermark: the first 64 bits of a picture's id, spread over its brightness.

Owns what is written and how: 96 bits, an id's first 64 and their CRC-32, each in its own hundred
frequencies of the whole picture. A frequency is counted in waves per picture, so scaling moves
none of them; cropping does. Anybody can read the mark, and write it: it says what made a picture to
those who want to know, and proves nothing to those who doubt it.
"""

import hashlib
import zlib
from functools import lru_cache

import numpy as np
from PIL import Image

VERSION = 1
"""Raised when a mark would be written in another way; part of the identity of a marked picture."""
NUM_DIGITS = 16
"""Hexadecimal digits of an id that a mark holds."""
NUM_BITS = 4 * NUM_DIGITS + 32
LOWEST, HIGHEST = 24, 112
"""Half waves per picture of what carries the mark: finer ones do not outlive JPEG, others show."""
STEP = 0.5
"""Of the quantizer, in levels of a pixel for the whole picture: more is firmer and shows more."""
ROUNDS = 8
"""Of writing: what cannot go where a picture is black or white goes elsewhere in it."""
FIRM = 0.15
"""Of a step: as near to another bit a written one may be."""
BRIGHTNESS = np.array([0.299, 0.587, 0.114])


def mark(image: Image.Image, image_id: str) -> Image.Image:
    """The RGB picture with the mark of that id; the same bits for the same picture and id."""
    bits = _bits_of(image_id)
    pixels = np.asarray(image.convert("RGB"), np.float64)
    marked = pixels
    for _ in range(ROUNDS):
        change, is_firm = _change(marked @ BRIGHTNESS, bits)
        if is_firm:
            break
        marked = np.clip(np.rint(marked + change[..., None]), 0, 255)
    return Image.fromarray(marked.astype(np.uint8))


def read(image: Image.Image) -> str | None:
    """The first digits of the id that a picture was marked with; None where there is no mark."""
    levels = np.asarray(image.convert("RGB"), np.float64) @ BRIGHTNESS
    bits = (np.floor(_values(levels) / (STEP / 2)).astype(int) % 2).astype(np.uint8)
    payload = np.packbits(bits).tobytes()
    digits, check = payload[: NUM_DIGITS // 2], payload[NUM_DIGITS // 2 :]
    return digits.hex() if zlib.crc32(digits).to_bytes(4) == check else None


def _bits_of(image_id: str) -> np.ndarray:
    digits = bytes.fromhex(image_id[:NUM_DIGITS])
    return np.unpackbits(np.frombuffer(digits + zlib.crc32(digits).to_bytes(4), np.uint8))


def _change(levels: np.ndarray, bits: np.ndarray) -> tuple[np.ndarray, bool]:
    """What is to be added to each pixel, and whether nothing has to be.

    A bit is in whether its value lies in an even or an odd half of a step: the middle of the
    nearest half of the right kind is the smallest change that outlives the most noise.
    """
    values = _values(levels)
    offset = (bits + 0.5) * STEP / 2
    away = np.rint((values - offset) / STEP) * STEP + offset - values
    owners, signs, counts = _carriers(*levels.shape)
    waves = (away / np.sqrt(counts))[owners] * signs
    height, width = _waves(levels.shape[0]), _waves(levels.shape[1])
    change = height.T @ waves @ width * np.sqrt(levels.size)
    return change, bool(np.abs(away).max() < (0.25 - FIRM) * STEP)


def _values(levels: np.ndarray) -> np.ndarray:
    """The number that carries each bit, (NUM_BITS,): a sum over its waves, of no scale."""
    owners, signs, counts = _carriers(*levels.shape)
    waves = _waves(levels.shape[0]) @ levels @ _waves(levels.shape[1]).T
    sums = np.bincount(owners.ravel(), (waves * signs).ravel(), NUM_BITS)
    return sums / np.sqrt(counts) / np.sqrt(levels.size)


@lru_cache(maxsize=8)
def _waves(side: int) -> np.ndarray:
    """The cosines of the orthonormal DCT up to HIGHEST, (waves, side)."""
    number = np.arange(min(HIGHEST, side))[:, None]
    waves = np.cos(np.pi / side * (np.arange(side) + 0.5) * number) * np.sqrt(2 / side)
    waves[0] /= np.sqrt(2)
    return waves


@lru_cache(maxsize=8)
def _carriers(height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each wave the bit that it carries and its sign, 0 where it carries none; each bit's waves.

    A hash decides both: no version of a library draws them anew.
    """
    drawn = np.frombuffer(hashlib.shake_256(b"rayjobs watermark 1").digest(8 * HIGHEST**2), "<u8")
    number = np.arange(HIGHEST)
    radius = np.hypot(number[:, None], number)
    is_used = ((radius >= LOWEST) & (radius < HIGHEST)).ravel()
    order = np.argsort(np.where(is_used, drawn, np.iinfo(np.uint64).max), kind="stable")
    owners = np.empty(HIGHEST**2, np.int64)
    owners[order] = np.arange(HIGHEST**2) % NUM_BITS
    signs = np.where(is_used, np.where(drawn & 1, 1.0, -1.0), 0.0)
    owners, signs = (
        part.reshape(HIGHEST, HIGHEST)[: min(height, HIGHEST), : min(width, HIGHEST)]
        for part in (owners, signs)
    )
    counts = np.bincount(owners.ravel(), np.abs(signs).ravel(), NUM_BITS)
    return owners, signs, np.maximum(counts, 1)
