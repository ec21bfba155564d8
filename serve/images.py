"""Strangers' pictures read, and answers encoded.

Owns which uploads are taken, what is kept of them, how a bad one is told, and the bytes that are
sent back. Knows neither torch, Ray nor HTTP, and keeps nothing between calls: any thread may call.

A file's first bytes say what it is. Its chunks are walked here, and a decoder sees those only that
make the picture: texts, comments, previews and whatever is appended are never parsed.
"""

import io
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from PIL import Image, ImageCms, ImageOps

from serve.protocol import Pixels

MOST_CHUNKS = 50_000
"""Of a file. A PNG written row by row has some thousands; each costs a little of Python's time."""
MOST_SCANS = 100
"""Of a JPEG. Encoders write about ten, and a scan of two bytes costs a pass over all pixels."""
MOST_PROFILE_BYTES = 4 * 2**20
MIN_444_QUALITY = 90

CUT_OFF = "is cut off; send the whole file"
TOO_MANY_PARTS = "is made of too many parts; open it and save it again"
DAMAGED = "cannot be decoded, it is damaged or of an unusual kind; open it and save it again"
TOO_LARGE = "needs more memory than there is; make it smaller"

PNG_PICTURE = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}
JPEG_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
JPEG_SIZES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
JPEG_PICTURE = JPEG_SIZES | {0xC4, 0xCC, 0xDB, 0xDD, 0xE0, 0xEE}
JPEG_END, JPEG_SCAN, JPEG_EXIF, JPEG_PROFILE = 0xD9, 0xDA, 0xE1, 0xE2

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
PROFILE_SPACES = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}


class BadImage(ValueError):
    """What is wrong with an upload, and what to do about it."""

    def __init__(self, message: str, param: str = "image") -> None:
        super().__init__(message)
        self.param = param


class _Unfit(ValueError):
    """What is wrong, as it goes on after `The image ...`."""


@dataclass(frozen=True)
class _File:
    """A picture's file, without what its decoder need not see."""

    format: str
    width: int
    height: int
    data: bytes
    exif: bytes = b""
    profile: bytes = b""
    depth: int = 8


def read_image(data: bytes, param: str, most_bytes: int, most_pixels: int) -> Pixels:
    """An upload as RGB: upright, sRGB, on white where it is transparent. Raises BadImage.

    `most_pixels` must be below Image.MAX_IMAGE_PIXELS, where Pillow's own limit begins.
    """
    with _told_of(param):
        image, file = _opened(data, most_bytes, most_pixels)
        colours, alpha = _split(image, file.depth)
        del image
        colours = _to_srgb(colours, file.profile)
        if alpha is not None:
            white = Image.new("RGB", colours.size, "white")
            colours = Image.composite(colours, white, alpha)
        return to_pixels(colours)


def read_mask(data: bytes, size: tuple[int, int], most_bytes: int, most_pixels: int) -> Pixels:
    """An upload as a mask (L) for an upright image of `size`: 255 is changed. Raises BadImage.

    Transparent is changed where it has an alpha channel (OpenAI's rule), else white is (diffusers').
    """
    with _told_of("mask"):
        image, file = _opened(data, most_bytes, most_pixels)
        if image.size != size:
            sizes = f"{image.width}x{image.height} and the image {size[0]}x{size[1]}"
            raise _Unfit(f"is {sizes} pixels; make it as large as the image")
        colours, alpha = _split(image, file.depth)
        if alpha is not None:
            mask = alpha.point(range(255, -1, -1))
            lacks = "transparent pixel; make it transparent"
        else:
            mask = colours.convert("RGB").convert("L")
            lacks = "white pixel; paint it white"
        if mask.getextrema() == (0, 0):
            raise _Unfit(f"has no {lacks} where the image is to change")
        return to_pixels(mask)


def fitted(pixels: Pixels, width: int, height: int) -> Pixels:
    """Scaled to cover width x height, and cropped in the middle."""
    if (pixels.width, pixels.height) == (width, height):
        return pixels
    size = (width, height)
    return to_pixels(ImageOps.fit(to_image(pixels), size, Image.Resampling.LANCZOS))


def encode(pixels: Pixels, format: Literal["png", "jpeg", "webp"], compression: int) -> bytes:
    """A file's bytes, the same each time. `compression` (0-100) is jpeg's and webp's quality."""
    image, quality = to_image(pixels), min(max(compression, 1), 100)
    file = io.BytesIO()
    if format == "png":
        # Photos of 1024x1024, one thread: run lengths 53 ms, 1080 KiB. Level 1: 60 ms, 1190 KiB.
        # Level 6, Pillow's own: 200 ms, 1040 KiB.
        image.save(file, "PNG", compress_type=zlib.Z_RLE)
    elif format == "jpeg":
        subsampling = "4:4:4" if quality >= MIN_444_QUALITY else "4:2:0"
        image.save(file, "JPEG", quality=quality, subsampling=subsampling)
    else:
        image.save(file, "WEBP", quality=quality)
    return file.getvalue()


def to_pixels(image: Image.Image) -> Pixels:
    """A picture's bytes: L if it is L, else RGB."""
    if image.mode == "L":
        return Pixels(image.width, image.height, image.tobytes(), "L")
    return Pixels(image.width, image.height, image.convert("RGB").tobytes())


def to_image(pixels: Pixels) -> Image.Image:
    """A picture of these bytes: read-only, and without a copy if they are L."""
    size = (pixels.width, pixels.height)
    return Image.frombuffer(pixels.mode, size, pixels.data, "raw", pixels.mode, 0, 1)


@contextmanager
def _told_of(param: str) -> Iterator[None]:
    """Whatever is raised inside becomes a BadImage that quotes no decoder."""
    try:
        yield
    except _Unfit as unfit:
        raise BadImage(f"The {param} {unfit}.", param) from None
    except MemoryError:
        raise BadImage(f"The {param} {TOO_LARGE}.", param) from None
    except Exception:  # decoders raise anything
        raise BadImage(f"The {param} {DAMAGED}.", param) from None


def _opened(data: bytes, most_bytes: int, most_pixels: int) -> tuple[Image.Image, _File]:
    """The picture, decoded and upright, and the file that it is in."""
    if not data:
        raise _Unfit("is empty; send the bytes of a PNG, JPEG or WebP file")
    if len(data) > most_bytes:
        raise _Unfit(f"is {len(data)} bytes; make it smaller, at most {most_bytes} are taken")
    file = _file(data)
    if file.width * file.height > most_pixels:
        size = f"{file.width}x{file.height}"
        raise _Unfit(f"is {size} pixels; make it smaller, at most {most_pixels} in all are taken")
    image = Image.open(io.BytesIO(file.data), formats=(file.format,))
    if image.size != (file.width, file.height):
        raise _Unfit(DAMAGED)
    if getattr(image, "n_frames", 1) > 1:
        raise _Unfit("is animated; save one of its frames")
    image.load()
    if file.format == "WEBP":
        exif, profile = (image.info.get(name) or b"" for name in ("exif", "icc_profile"))
        file = _File("WEBP", file.width, file.height, b"", exif, profile)
    turn = UPRIGHT.get(_orientation(file.exif))
    return image if turn is None else image.transpose(turn), file


def _file(data: bytes) -> _File:
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return _png(data)
    if data.startswith(b"\xff\xd8\xff"):
        return _jpeg(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _webp(data)
    raise _Unfit("is no PNG, JPEG or WebP by its bytes, whatever its name; save it as one of these")


def _png(data: bytes) -> _File:
    view, at = memoryview(data), 8
    kept, exif, profile = [view[:8]], b"", b""
    for _ in range(MOST_CHUNKS):
        start, name = at, data[at + 4 : at + 8]
        at += 12 + int.from_bytes(data[at : at + 4])
        if at > len(data):
            raise _Unfit(CUT_OFF)
        if name in PNG_PICTURE:
            kept.append(view[start:at])
        elif name == b"acTL" and int.from_bytes(data[start + 8 : start + 12]) > 1:
            raise _Unfit("is animated; save one of its frames")
        elif name == b"eXIf":
            exif = data[start + 8 : at - 4]
        elif name == b"iCCP":
            profile = _inflated(data[start + 8 : at - 4])
        if name == b"IEND":
            width, height = int.from_bytes(data[16:20]), int.from_bytes(data[20:24])
            return _File("PNG", width, height, b"".join(kept), exif, profile, data[24])
    raise _Unfit(TOO_MANY_PARTS)


def _inflated(chunk: bytes) -> bytes:
    """The profile in an iCCP chunk; none if it is damaged or large."""
    inflate = zlib.decompressobj()
    try:
        profile = inflate.decompress(chunk.partition(b"\0")[2][1:], MOST_PROFILE_BYTES)
    except zlib.error:
        return b""
    return profile if inflate.eof else b""


def _jpeg(data: bytes) -> _File:
    view, width, height = memoryview(data), 0, 0
    kept, exif, profile, scans = [view[:2]], b"", [], []
    for marker, start, end in _segments(data):
        body = view[start + 4 : end]
        if marker == JPEG_SCAN:
            scans.append(start)
        elif marker == JPEG_END and scans:
            kept.append(view[scans[0] : end])
        elif scans:
            continue
        elif marker in JPEG_PICTURE:
            kept.append(view[start:end])
        elif marker == JPEG_EXIF and body[:6] == b"Exif\0\0":
            exif = exif or bytes(body)
        elif marker == JPEG_PROFILE and body[:12] == b"ICC_PROFILE\0":
            profile.append(bytes(body[12:]))
        if marker in JPEG_SIZES:
            height, width = int.from_bytes(body[1:3]), int.from_bytes(body[3:5])
    if len(scans) > MOST_SCANS:
        raise _Unfit(TOO_MANY_PARTS)
    icc = b"".join(part[2:] for part in sorted(profile))
    return _File("JPEG", width, height, b"".join(kept), exif, icc)


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """The markers of a JPEG up to its end, each with where its segment starts and ends."""
    at = 2
    for _ in range(MOST_CHUNKS):
        found = JPEG_MARKER.search(data, at)
        if found is None:
            raise _Unfit(CUT_OFF)
        start, at = found.span()
        marker = data[start + 1]
        if marker in (0x01, 0xD8):  # they have no segment
            continue
        if marker == JPEG_END:
            yield marker, start, at
            return
        at += max(2, int.from_bytes(data[at : at + 2]))
        if at > len(data):
            raise _Unfit(CUT_OFF)
        yield marker, start, at
    raise _Unfit(TOO_MANY_PARTS)


def _webp(data: bytes) -> _File:
    """Its size alone: libwebp's memory for it is taken when it is opened."""
    width = height = 0
    if data[12:16] == b"VP8X":
        width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
    elif data[12:16] == b"VP8L":
        sizes = int.from_bytes(data[21:25], "little")
        width, height = (sizes & 0x3FFF) + 1, (sizes >> 14 & 0x3FFF) + 1
    elif data[12:16] == b"VP8 ":
        width, height = (int.from_bytes(data[at : at + 2], "little") & 0x3FFF for at in (26, 28))
    if len(data) < 30 or not width or not height:
        raise _Unfit(DAMAGED)
    return _File("WEBP", width, height, data)


def _orientation(exif: bytes) -> int:
    """What EXIF's first directory says, 1 if it says nothing. What lies outside it is 0."""
    exif = exif.removeprefix(b"Exif\0\0")
    order: Literal["little", "big"] = "little" if exif[:2] == b"II" else "big"

    def number(at: int, length: int = 2) -> int:
        return int.from_bytes(exif[at : at + length], order)

    if exif[:2] not in (b"II", b"MM") or number(2) != 42:
        return 1
    directory = number(4, 4)
    for entry in range(directory + 2, directory + 2 + 12 * number(directory), 12):
        if number(entry) == 0x0112:
            return number(entry + 8, 4 if number(entry + 2) == 4 else 2)
    return 1


def _split(image: Image.Image, depth: int) -> tuple[Image.Image, Image.Image | None]:
    """Its colours in RGB, L or CMYK of 8 bits, and its alpha channel if it has one."""
    key = image.info.get("transparency")
    if image.mode == "P":
        image = image.convert("RGB" if key is None else "RGBA")
    elif image.mode == "I;16":  # Pillow's own conversion cuts it at 255
        image = Image.frombytes("L", image.size, image.tobytes()[1::2])
    elif image.mode == "1":
        image = image.convert("L")
    if key is not None and image.mode in ("L", "RGB"):
        image.info["transparency"] = _in_8_bits(key, depth)
        image = image.convert("RGBA")
    if image.mode in ("LA", "RGBA"):
        return image.convert(image.mode[:-1]), image.getchannel("A")
    return image, None


def _in_8_bits(key: int | tuple[int, ...], depth: int) -> int | tuple[int, ...]:
    """A PNG's transparent colour, which Pillow gives in the file's depth, but for 1 bit."""
    if isinstance(key, tuple):
        return tuple(value >> 8 if depth == 16 else value & 255 for value in key)
    if depth == 16:
        return key >> 8
    return (key & 2**depth - 1) * 255 // (2**depth - 1) if depth in (2, 4) else key & 255


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """In RGB; a profile that is broken, large or of other colours is worth less than the picture."""
    if not profile or len(profile) > MOST_PROFILE_BYTES:
        return image.convert("RGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != PROFILE_SPACES[image.mode]:
            return image.convert("RGB")
        target = ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, source, target, outputMode="RGB") or image
    except (ImageCms.PyCMSError, OSError, TypeError):
        return image.convert("RGB")
