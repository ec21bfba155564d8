"""One picture has the same pixels for `generate`, for training and for serving.

Each program reads the file through its own entrance: `generate` as an init image, DreamBooth as a
photograph, serving as an upload.
"""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from rayjobs.config import BadInput
from rayjobs.dreambooth.data.photos import find_photos
from rayjobs.generation.worker.pictures import read_picture
from rayjobs.images.sandbox import Sandbox, SandboxPool
from serve.images import BadImage, read_image, to_image

SIZE = (48, 32)
MAX_BYTES, MAX_PIXELS = 2**20, 2**20
SANDBOX, POOL = Sandbox(), SandboxPool(1)
ROTATED = 6
"""EXIF: to be shown turned by 90 degrees."""


def generated(data: bytes, folder: Path) -> Image.Image:
    file = folder / "init.png"
    file.write_bytes(data)
    init = read_picture(str(file), "init image", SANDBOX)
    if init.image is None:
        raise ValueError(init.error)
    return init.image


def trained(data: bytes, folder: Path) -> Image.Image:
    photos = folder / "photos"
    photos.mkdir(exist_ok=True)
    (photos / "photo.png").write_bytes(data)
    (photo,) = find_photos(str(photos), "a photo of sks dog")
    return photo.open()


def served(data: bytes, folder: Path) -> Image.Image:
    return to_image(read_image(data, "image", MAX_BYTES, MAX_PIXELS, POOL.decode))


PROGRAMS: dict[str, Callable[[bytes, Path], Image.Image]] = {
    "generate": generated,
    "train": trained,
    "serve": served,
}


def picture() -> Image.Image:
    corners = bytes([250, 30, 20, 20, 200, 60, 30, 40, 220, 90, 90, 90])
    return Image.frombytes("RGB", (2, 2), corners).resize(SIZE, Image.Resampling.BICUBIC)


def saved(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def transparent(mode: str) -> Image.Image:
    """Opaque on the left; on the right, hidden colours."""
    image, alpha = picture().convert(mode[:-1]), Image.new("L", SIZE, 255)
    alpha.paste(0, (24, 0, 48, 32))
    image.putalpha(alpha)
    return image


def profiled() -> bytes:
    """A JPEG whose profile exchanges red and blue."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for old, new in ((b"rXYZ", b"...."), (b"bXYZ", b"rXYZ"), (b"....", b"bXYZ")):
        profile = profile.replace(old, new)
    red, green, blue = picture().split()
    swapped = Image.merge("RGB", (blue, green, red))
    return saved(swapped, "JPEG", quality=98, subsampling=0, icc_profile=profile)


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = ROTATED
    stored = picture().transpose(Image.Transpose.ROTATE_90)
    return saved(stored, "JPEG", quality=98, subsampling=0, exif=exif)


def grey_ramp() -> np.ndarray:
    return np.linspace(0, 65535, SIZE[0] * SIZE[1]).round().astype(np.uint16).reshape(SIZE[::-1])


def deep_colours() -> bytes:
    """A PNG of 16 bits a colour, which Pillow reads and does not write."""
    values = (np.asarray(picture()).astype(">u2") * 257).reshape(SIZE[1], -1)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", *SIZE, 16, 2, 0, 0, 0))]
    chunks += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    packed = [
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def animated(format: str) -> bytes:
    more = [Image.new("RGB", SIZE, "red"), Image.new("RGB", SIZE, "blue")]
    return saved(picture(), format, lossless=True, save_all=True, append_images=more)


def on_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGBA", SIZE, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def palette() -> tuple[bytes, Image.Image]:
    """Its transparent colour is that of the first pixel."""
    image = picture().quantize(16)
    index = image.getpixel((0, 0))
    shown = np.asarray(image.convert("RGB")).copy()
    shown[np.asarray(image) == index] = 255
    return saved(image, transparency=index), Image.fromarray(shown)


def scaled(values: np.ndarray) -> Image.Image:
    return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")


def kinds() -> dict[str, tuple[bytes, Image.Image, float]]:
    """By kind, a file, what it shows, and how far off a lossy format may be on average."""
    grey, one_bit, cmyk = picture().convert("L"), picture().convert("1"), picture().convert("CMYK")
    return {
        "rgb": (saved(picture()), picture(), 0),
        "turned by EXIF": (rotated(), picture(), 3),
        "with a profile": (profiled(), picture(), 4),
        "grey of 16 bits": (saved(Image.fromarray(grey_ramp())), scaled(grey_ramp()), 0),
        "colours of 16 bits": (deep_colours(), picture(), 0),
        "transparent": (saved(transparent("RGBA")), on_white(transparent("RGBA")), 0),
        "transparent grey": (saved(transparent("LA")), on_white(transparent("LA")), 0),
        "transparent palette": (*palette(), 0),
        "transparent webp": (
            saved(transparent("RGBA"), "WEBP", lossless=True, exact=True),
            on_white(transparent("RGBA")),
            0,
        ),
        "cmyk": (saved(cmyk, "JPEG", quality=98), cmyk.convert("RGB"), 3),
        "one bit": (saved(one_bit), one_bit.convert("RGB"), 0),
        "grey": (saved(grey), grey.convert("RGB"), 0),
        "progressive": (saved(picture(), "JPEG", quality=98, progressive=True), picture(), 3),
        "animated webp": (animated("WEBP"), picture(), 0),
        "animated png": (animated("PNG"), picture(), 0),
    }


KINDS = kinds()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_picture_is_the_same_in_every_program(program: str, kind: str, tmp_path: Path) -> None:
    data, expected, tolerance = KINDS[kind]
    image = PROGRAMS[program](data, tmp_path)
    assert (image.mode, image.size) == ("RGB", SIZE)
    difference = np.asarray(image).astype(int) - np.asarray(expected)
    assert np.abs(difference).mean() <= tolerance
    generated_too = generated(data, tmp_path).tobytes()
    assert image.tobytes() == generated_too


def test_a_ramp_of_16_bits_has_the_mean_of_a_ramp_of_8(tmp_path: Path) -> None:
    data, _, _ = KINDS["grey of 16 bits"]
    for read in PROGRAMS.values():
        assert np.asarray(read(data, tmp_path)).mean() == pytest.approx(127.5, abs=0.2)


def huge() -> bytes:
    """A PNG whose header claims 40 gigapixels."""
    data = bytearray(saved(picture()))
    data[16:24] = struct.pack(">II", 200_000, 200_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (saved(picture())[:-100], "is cut off"),
        (saved(picture(), "JPEG")[:-50], "is cut off"),
        (saved(picture(), "WEBP")[:-50], "cannot be decoded"),
        (huge(), "is 200000x200000 pixels"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is no"),
        (b"", "is empty"),
    ],
    ids=["png cut off", "jpeg cut off", "webp cut off", "huge", "unknown", "empty"],
)
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_bad_picture_is_refused_for_the_same_reason(
    program: str, data: bytes, reason: str, tmp_path: Path
) -> None:
    with pytest.raises((ValueError, BadInput, BadImage)) as caught:
        PROGRAMS[program](data, tmp_path)
    message = str(caught.value)
    assert reason in message
    assert ";" in message
    assert str(tmp_path) not in message
