"""Pictures to upload in tests, some made by hand as Pillow writes none, and how they are read."""

import io
import random
import struct
import zlib
from typing import Any

import pytest
from PIL import Image, ImageChops, ImageCms, ImageStat

from serve.images import BadImage, read_image, to_image

MAX_BYTES, MAX_PIXELS = 24 * 2**20, 2**20
FORMATS = ["PNG", "JPEG", "WEBP"]
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def saved(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def read(data: bytes) -> Image.Image:
    return to_image(read_image(data, "image", MAX_BYTES, MAX_PIXELS))


def refusal(data: bytes, max_bytes: int = MAX_BYTES) -> str:
    """What is told of a bad upload: what to do about it, and nothing of this machine."""
    with pytest.raises(BadImage) as caught:
        read_image(data, "image", max_bytes, MAX_PIXELS)
    told = str(caught.value)
    assert caught.value.param == "image"
    assert told.startswith("The image ")
    assert ";" in told
    assert not any(word in told for word in ("0x", "/", "BytesIO", "PIL", "rror"))
    return told


def picture(width: int = 48, height: int = 32) -> Image.Image:
    """Smooth colours, each corner another."""
    corners = bytes([250, 30, 20, 20, 200, 60, 30, 40, 220, 9, 9, 9])
    return Image.frombytes("RGB", (2, 2), corners).resize((width, height), Image.Resampling.BICUBIC)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    data = random.Random(seed).randbytes(width * height * 3)
    return Image.frombytes("RGB", (width, height), data)


def row(image: Image.Image) -> list[Any]:
    return [image.getpixel((x, 0)) for x in range(image.width)]


def far(one: Image.Image, other: Image.Image) -> float:
    """How much two pictures differ: the worst channel's mean, 0-255."""
    assert one.size == other.size
    return max(ImageStat.Stat(ImageChops.difference(one.convert("RGB"), other.convert("RGB"))).mean)


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(size: tuple[int, int], depth: int, kind: int, rows: bytes, key: bytes = b"") -> bytes:
    """A PNG of a kind that Pillow reads, and does not write."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, kind, 0, 0, 0))
    body = (chunk(b"tRNS", key) if key else b"") + chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + head + body + chunk(b"IEND", b"")


def with_chunks(data: bytes, *more: tuple[bytes, bytes]) -> bytes:
    """A PNG with more chunks after its header."""
    return data[:33] + b"".join(chunk(name, body) for name, body in more) + data[33:]


def with_segments(data: bytes, *more: tuple[int, bytes]) -> bytes:
    """A JPEG with more segments at its start."""
    packed = (struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body for marker, body in more)
    return data[:2] + b"".join(packed) + data[2:]
