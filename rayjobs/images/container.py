"""The file around a picture: its format and size by its own bytes, and the parts a decoder needs.

Owns the walk through the chunks of PNG, JPEG and WebP: texts, comments, previews and whatever is
appended never reach a decoder, and the size is known before anything is decoded. Knows no pixels.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

MAX_CHUNKS = 50_000
"""Of a file. A PNG written row by row has some thousands; each costs a little of Python's time."""
MAX_SCANS = 100
"""Of a JPEG. Encoders write about ten, and a scan of two bytes costs a pass over all pixels."""

CUT_OFF = "is cut off; give the whole file"
TOO_MANY_PARTS = "is made of too many parts; open it and save it again"

PNG_PICTURE = {b"IHDR", b"PLTE", b"tRNS", b"iCCP", b"IDAT", b"IEND"}
JPEG_MARKER = re.compile(rb"\xff[\x02-\xcf\xd9-\xfe]")
JPEG_SIZES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
JPEG_PICTURE = JPEG_SIZES | {0xC4, 0xCC, 0xDB, 0xDD, 0xE0, 0xEE}
JPEG_END, JPEG_SCAN = 0xD9, 0xDA
EXIF_ORDERS: dict[bytes, Literal["little", "big"]] = {b"II*\0": "little", b"MM\0*": "big"}


class UnreadableImage(ValueError):
    """What is wrong with a picture and what to do, as a phrase: "is cut off; give the whole file".

    It follows the picture's name, quotes no decoder and names no path.
    """


@dataclass(frozen=True)
class Container:
    """A picture's file, without what its decoder need not see."""

    format: str
    width: int
    height: int
    data: bytes
    exif: bytes = b""
    depth: int = 8
    """Bits of a sample."""


def read_container(data: bytes) -> Container | None:
    """What a PNG, JPEG or WebP file holds; None for another format. Raises UnreadableImage."""
    read = next((READERS[start] for start in READERS if re.match(start, data)), None)
    return None if read is None else read(data)


def exif_orientation(exif: bytes) -> int:
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


def _png(data: bytes) -> Container:
    """Of an animation, the picture for viewers that show one."""
    view, at = memoryview(data), 8
    kept, exif = [view[:8]], b""
    for _ in range(MAX_CHUNKS):
        start, name = at, data[at + 4 : at + 8]
        at += 12 + int.from_bytes(data[at : at + 4])
        if at > len(data):
            raise UnreadableImage(CUT_OFF)
        if name in PNG_PICTURE:
            kept.append(view[start:at])
        elif name == b"eXIf":
            exif = data[start + 8 : at - 4]
        if name == b"IEND":
            width, height = int.from_bytes(data[16:20]), int.from_bytes(data[20:24])
            return Container("PNG", width, height, b"".join(kept), exif, data[24])
    raise UnreadableImage(TOO_MANY_PARTS)


def _jpeg(data: bytes) -> Container:
    """Of a camera's several pictures (MPO), the first."""
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
    if len(scans) > MAX_SCANS:
        raise UnreadableImage(TOO_MANY_PARTS)
    return Container("JPEG", width, height, b"".join(kept), exif)


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """The markers of a JPEG up to its end, each with where its segment starts and ends."""
    at = 2
    for _ in range(MAX_CHUNKS):
        match = JPEG_MARKER.search(data, at)
        if match is None:
            raise UnreadableImage(CUT_OFF)
        start, at = match.span()
        marker = data[start + 1]
        if marker == JPEG_END:
            yield marker, start, at
            return
        at += max(2, int.from_bytes(data[at : at + 2]))
        if at > len(data):
            raise UnreadableImage(CUT_OFF)
        yield marker, start, at
    raise UnreadableImage(TOO_MANY_PARTS)


def _webp(data: bytes) -> Container:
    """Its size alone: libwebp's memory for it is taken when it is opened."""
    first, number = data[12:16], partial(int.from_bytes, byteorder="little")
    if first == b"VP8X":
        width, height = number(data[24:27]) + 1, number(data[27:30]) + 1
    elif first == b"VP8L":
        width, height = (number(data[21:23]) & 0x3FFF) + 1, (number(data[22:25]) >> 6 & 0x3FFF) + 1
    else:
        width, height = number(data[26:28]) & 0x3FFF, number(data[28:30]) & 0x3FFF
    return Container("WEBP", width, height, data)


READERS = {rb"\x89PNG\r\n\x1a\n": _png, rb"\xff\xd8\xff": _jpeg, rb"(?s)RIFF....WEBP": _webp}
"""By how a file starts."""
