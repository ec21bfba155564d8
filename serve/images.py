"""Strangers' pictures read, and answers encoded.

Owns which uploads are taken, what is kept of them, how a bad one is told, and the bytes that are
sent back. Knows neither torch, Ray nor HTTP, and keeps nothing between calls: any thread may call.

A file's first bytes say what it is. Its chunks are walked here, and a decoder sees those only that
make the picture: texts, comments, previews and whatever is appended are never parsed.
"""

import io
import re
import zlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Literal

from PIL import Image, ImageCms, ImageOps

from serve.protocol import Pixels

MOST_CHUNKS = 50_000
"""Of a file. A PNG written row by row has some thousands; each costs a little of Python's time."""
MOST_SCANS = 100
"""Of a JPEG. Encoders write about ten, and a scan of two bytes costs a pass over all pixels."""
MOST_PROFILE_BYTES = 4 * 2**20

ANIMATED = "is animated; save one of its frames"
CUT_OFF = "is cut off; send the whole file"
TOO_MANY_PARTS = "is made of too many parts; open it and save it again"
DAMAGED = "cannot be decoded, it is damaged or of an unusual kind; open it and save it again"
PNG_PICTURE = {b"IHDR", b"PLTE", b"tRNS", b"iCCP", b"IDAT", b"IEND"}
JPEG_MARKER = re.compile(rb"\xff[\x02-\xcf\xd9-\xfe]")
JPEG_SIZES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
JPEG_PICTURE = JPEG_SIZES | {0xC4, 0xCC, 0xDB, 0xDD, 0xE0, 0xEE}
JPEG_END, JPEG_SCAN = 0xD9, 0xDA

TURNS = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90"
UPRIGHT = {number: Image.Transpose[name] for number, name in enumerate(TURNS.split(), 2)}
"""By EXIF's orientation."""
EXIF_ORDERS: dict[bytes, Literal["little", "big"]] = {b"II*\0": "little", b"MM\0*": "big"}


class BadImage(ValueError):
    """What is wrong with an upload, and what to do about it."""

    def __init__(self, message: str, param: str = "image") -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True)
class _File:
    """A picture's file, without what its decoder need not see."""

    format: str
    width: int
    height: int
    data: bytes
    exif: bytes = b""
    depth: int = 8


def read_image(data: bytes, param: str, most_bytes: int, most_pixels: int) -> Pixels:
    """An upload as RGB: upright, sRGB, on white where it is transparent. Raises BadImage.

    While it runs it takes some 20 bytes of memory for each pixel, and the file's size twice.
    `most_pixels` must be below Image.MAX_IMAGE_PIXELS, where Pillow's own limit begins.
    """
    with _told_of(param):
        colours, alpha, profile = _decoded(_file(data, most_bytes, most_pixels))
        colours = _to_srgb(colours, profile)
        if alpha is not None:
            colours = Image.composite(colours, Image.new("RGB", colours.size, "white"), alpha)
        return to_pixels(colours)


def read_mask(data: bytes, size: tuple[int, int], most_bytes: int, most_pixels: int) -> Pixels:
    """An upload as a mask (L) for an upright image of `size`: 255 is changed. Raises BadImage.

    With an alpha channel what is transparent is changed (OpenAI's rule), else what is white.
    """
    with _told_of("mask"):
        colours, alpha, _ = _decoded(_file(data, most_bytes, most_pixels))
        if colours.size != size:
            sizes = f"{colours.width}x{colours.height} and the image {size[0]}x{size[1]}"
            raise BadImage(f"is {sizes} pixels; make it as large as the image")
        grey = colours.convert("RGB").convert("L")
        mask, kind = (grey, "white") if alpha is None else (ImageOps.invert(alpha), "transparent")
        if mask.getextrema() == (0, 0):
            raise BadImage(f"has no {kind} pixel; make it {kind} where the image is to change")
        return to_pixels(mask)


def fitted(pixels: Pixels, width: int, height: int) -> Pixels:
    """Scaled to cover width x height, and cropped in the middle."""
    if (pixels.width, pixels.height) == (width, height):
        return pixels
    return to_pixels(ImageOps.fit(to_image(pixels), (width, height), Image.Resampling.LANCZOS))


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
def _told_of(param: str) -> Generator[None]:
    """Whatever is raised inside becomes a BadImage on `param` that quotes no decoder.

    A BadImage of this module has what goes on after `The image ...`.
    """
    try:
        yield
    except BadImage as bad:
        raise BadImage(f"The {param} {bad}.", param) from None
    except Exception as error:  # decoders raise anything
        large = "needs more memory than there is; make it smaller"
        reason = large if isinstance(error, MemoryError) else DAMAGED
        raise BadImage(f"The {param} {reason}.", param) from None


def _decoded(file: _File) -> tuple[Image.Image, Image.Image | None, bytes]:
    """A picture's colours (RGB, L or CMYK) and alpha channel, both upright, and its profile."""
    image = Image.open(io.BytesIO(file.data), formats=(file.format,))
    if image.size != (file.width, file.height):
        raise BadImage(DAMAGED)
    if getattr(image, "n_frames", 1) > 1:
        raise BadImage(ANIMATED)
    # Fed in parts, a decoder that waits for more has all that it was given copied each time.
    image.decodermaxblock = len(file.data)
    image.load()
    turn = UPRIGHT.get(_orientation(file.exif or image.info.get("exif", b"")))
    colours, alpha = _split(image if turn is None else image.transpose(turn), file.depth)
    return colours, alpha, image.info.get("icc_profile") or b""


def _file(data: bytes, most_bytes: int, most_pixels: int) -> _File:
    """What is in these bytes, if it is neither large nor of another format."""
    if not data:
        raise BadImage("is empty; send the bytes of a PNG, JPEG or WebP file")
    if len(data) > most_bytes:
        raise BadImage(f"is {len(data)} bytes; make it {most_bytes} bytes or less")
    read = next((READERS[start] for start in READERS if re.match(start, data)), None)
    if read is None:
        raise BadImage("is no PNG, JPEG or WebP file, whatever its name; save it as one of these")
    file = read(data)
    if file.width * file.height > most_pixels:
        size = f"{file.width}x{file.height}"
        raise BadImage(f"is {size} pixels; make it {most_pixels} pixels or less in all")
    return file


def _png(data: bytes) -> _File:
    view, at = memoryview(data), 8
    kept, exif = [view[:8]], b""
    for _ in range(MOST_CHUNKS):
        start, name = at, data[at + 4 : at + 8]
        at += 12 + int.from_bytes(data[at : at + 4])
        if at > len(data):
            raise BadImage(CUT_OFF)
        if name in PNG_PICTURE:
            kept.append(view[start:at])
        elif name == b"acTL" and int.from_bytes(data[start + 8 : start + 12]) > 1:
            raise BadImage(ANIMATED)
        elif name == b"eXIf":
            exif = data[start + 8 : at - 4]
        if name == b"IEND":
            width, height = int.from_bytes(data[16:20]), int.from_bytes(data[20:24])
            return _File("PNG", width, height, b"".join(kept), exif, data[24])
    raise BadImage(TOO_MANY_PARTS)


def _jpeg(data: bytes) -> _File:
    view, width, height = memoryview(data), 0, 0
    kept, exif, scans = [view[:2]], b"", list[int]()
    for marker, start, end in _segments(data):
        body = view[start + 4 : end]
        if marker == JPEG_SCAN:
            scans.append(start)
        elif marker == JPEG_END and scans:
            kept.append(view[scans[0] : end])
        elif scans:
            continue
        elif marker in JPEG_PICTURE or body[:12] == b"ICC_PROFILE\0":
            kept.append(view[start:end])
        elif body[:6] == b"Exif\0\0":
            exif = exif or bytes(body)
        if marker in JPEG_SIZES:
            height, width = int.from_bytes(body[1:3]), int.from_bytes(body[3:5])
    if len(scans) > MOST_SCANS:
        raise BadImage(TOO_MANY_PARTS)
    return _File("JPEG", width, height, b"".join(kept), exif)


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """The markers of a JPEG up to its end, each with where its segment starts and ends."""
    at = 2
    for _ in range(MOST_CHUNKS):
        found = JPEG_MARKER.search(data, at)
        if found is None:
            raise BadImage(CUT_OFF)
        start, at = found.span()
        marker = data[start + 1]
        if marker == JPEG_END:
            yield marker, start, at
            return
        at += max(2, int.from_bytes(data[at : at + 2]))
        if at > len(data):
            raise BadImage(CUT_OFF)
        yield marker, start, at
    raise BadImage(TOO_MANY_PARTS)


def _webp(data: bytes) -> _File:
    """Its size alone: libwebp's memory for it is taken when it is opened."""
    first, number = data[12:16], partial(int.from_bytes, byteorder="little")
    if first == b"VP8X":
        width, height = number(data[24:27]) + 1, number(data[27:30]) + 1
    elif first == b"VP8L":
        width, height = (number(data[21:23]) & 0x3FFF) + 1, (number(data[22:25]) >> 6 & 0x3FFF) + 1
    else:
        width, height = number(data[26:28]) & 0x3FFF, number(data[28:30]) & 0x3FFF
    return _File("WEBP", width, height, data)


def _orientation(exif: bytes) -> int:
    """What EXIF's first directory says, 1 if it says nothing. What lies outside it is 0."""
    exif = exif.removeprefix(b"Exif\0\0")
    order = EXIF_ORDERS.get(exif[:4])
    if order is None:
        return 1

    def number(at: int, length: int = 2) -> int:
        return int.from_bytes(exif[at : at + length], order)

    directory = number(4, 4)
    for entry in range(directory + 2, directory + 2 + 12 * number(directory), 12):
        if number(entry) == 0x0112:
            return number(entry + 8, 4 if number(entry + 2) == 4 else 2)
    return 1


def _split(image: Image.Image, depth: int) -> tuple[Image.Image, Image.Image | None]:
    """Its colours and its alpha channel in 8 bits; `depth` is how many the file has."""
    key = image.info.get("transparency")
    if image.mode == "P":
        image = image.convert("RGB" if key is None else "RGBA")
    elif image.mode == "I;16":  # Pillow's own conversion cuts it at 255
        image = Image.frombytes("L", image.size, image.tobytes()[1::2])
    elif image.mode == "1":
        image = image.convert("L")
    if key is not None and image.mode in ("L", "RGB"):
        # A PNG's transparent colour, which Pillow leaves in the file's depth.
        parts, top = key if isinstance(key, tuple) else (key,), 2 ** min(depth, 8) - 1
        parts = tuple((part >> max(depth - 8, 0) & top) * 255 // top for part in parts)
        image.info["transparency"] = parts if len(parts) == 3 else parts[0]
        image = image.convert(image.mode + "A")
    if image.mode in ("LA", "RGBA"):
        return image.convert(image.mode[:-1]), image.getchannel("A")
    return image, None


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """In RGB. A profile that is broken, large or of other colours is not heeded."""
    if profile and len(profile) <= MOST_PROFILE_BYTES:
        with suppress(ImageCms.PyCMSError, OSError):
            source, target = io.BytesIO(profile), ImageCms.createProfile("sRGB")
            return ImageCms.profileToProfile(image, source, target, outputMode="RGB") or image
    return image if image.mode == "RGB" else image.convert("RGB")


READERS = {rb"\x89PNG\r\n\x1a\n": _png, rb"\xff\xd8\xff": _jpeg, rb"(?s)RIFF....WEBP": _webp}
"""By how a file starts."""
