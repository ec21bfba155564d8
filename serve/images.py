"""Uploads read, and answers encoded.

Owns which uploads are taken, what is said of a bad one, and the bytes that are sent back. Decoding
is `rayjobs.images`'. Knows neither torch, Ray nor HTTP, and keeps nothing between calls: any thread
may call.
"""

import io
import zlib
from collections.abc import Generator
from contextlib import contextmanager
from typing import Literal, Protocol

from PIL import Image, ImageOps

from rayjobs.images.container import UnreadableImage
from rayjobs.images.decode import WEB_FORMATS, Picture, decode
from serve.protocol import Pixels

MAX_CROPPED = 16
"""Times its size may an upload be scaled to before it is cropped."""


class BadImage(ValueError):
    """What is wrong with an upload, and what to do about it."""

    def __init__(self, message: str, param: str = "image") -> None:
        super().__init__(message)
        self.param = param


class Decode(Protocol):
    """`rayjobs.images.decode.decode`, here or in a sandbox."""

    def __call__(self, data: bytes, max_pixels: int, formats: tuple[str, ...]) -> Picture: ...


def read_image(
    data: bytes, param: str, max_bytes: int, max_pixels: int, decode: Decode = decode
) -> Pixels:
    """An upload as RGB: upright, sRGB, on white where it is transparent. Raises BadImage."""
    with _about(param):
        _check_size(data, max_bytes)
        return to_pixels(decode(data, max_pixels, WEB_FORMATS).on_white())


def read_mask(
    data: bytes,
    size: tuple[int, int],
    max_bytes: int,
    max_pixels: int,
    decode: Decode = decode,
) -> Pixels:
    """An upload as a mask (L) for an upright image of `size`: 255 is changed. Raises BadImage.

    With an alpha channel what is transparent is changed (OpenAI's rule), else what is white.
    """
    with _about("mask"):
        _check_size(data, max_bytes)
        picture = decode(data, max_pixels, WEB_FORMATS)
        width, height = picture.colours.size
        if (width, height) != size:
            raise UnreadableImage(
                f"is {width}x{height} and the image {size[0]}x{size[1]} pixels; make it as large "
                "as the image"
            )
        mask, kind = picture.mask(), "white"
        if picture.alpha is not None:
            mask, kind = ImageOps.invert(picture.alpha), "transparent"
        if mask.getextrema() == (0, 0):
            raise UnreadableImage(
                f"has no {kind} pixel; make it {kind} where the image is to change"
            )
        return to_pixels(mask)


def fitted(pixels: Pixels, width: int, height: int) -> Pixels:
    """Scaled to cover width x height, and cropped in the middle, with the bits of diffusers'
    `VaeImageProcessor`, which a job has; not where much would be scaled that is cropped."""
    if (pixels.width, pixels.height) == (width, height):
        return pixels
    image, how = to_image(pixels), Image.Resampling.LANCZOS
    is_wide = width * image.height <= image.width * height
    w = image.width * height // image.height if is_wide else width
    h = height if is_wide else image.height * width // image.width
    if w * h > MAX_CROPPED * width * height:
        return to_pixels(ImageOps.fit(image, (width, height), how))
    left, top = w // 2 - width // 2, h // 2 - height // 2
    return to_pixels(image.resize((w, h), how).crop((left, top, left + width, top + height)))


def encode(pixels: Pixels, format: Literal["png", "jpeg", "webp"], compression: int) -> bytes:
    """A file's bytes, the same each time. `compression` (0-100) is jpeg's and webp's quality."""
    quality = min(max(compression, 1), 100)
    options: dict[str, dict[str, int]] = {
        # Photos of 1024x1024: run lengths 53 ms, 1080 KiB; level 1 60, 1190; level 6 200, 1040.
        "png": {"compress_type": zlib.Z_RLE},
        # Colours at full size (0) where quality is asked for, else at half (2).
        "jpeg": {"quality": quality, "subsampling": 0 if quality >= 90 else 2},
        "webp": {"quality": quality},
    }
    file = io.BytesIO()
    to_image(pixels).save(file, format, **options[format])
    return file.getvalue()


def to_pixels(image: Image.Image) -> Pixels:
    """A picture's bytes: L if it is L, else RGB."""
    mode: Literal["L", "RGB"] = "L" if image.mode == "L" else "RGB"
    same = image if image.mode == mode else image.convert(mode)
    return Pixels(image.width, image.height, same.tobytes(), mode)


def to_image(pixels: Pixels) -> Image.Image:
    """A picture of these bytes: read-only, and without a copy if they are L."""
    return Image.frombuffer(pixels.mode, (pixels.width, pixels.height), pixels.data)


@contextmanager
def _about(param: str) -> Generator[None]:
    """An UnreadableImage that is raised inside becomes a BadImage on `param`."""
    try:
        yield
    except UnreadableImage as error:
        raise BadImage(f"The {param} {error}.", param) from None


def _check_size(data: bytes, max_bytes: int) -> None:
    if len(data) > max_bytes:
        raise UnreadableImage(f"is {len(data)} bytes; make it {max_bytes} bytes or less")
