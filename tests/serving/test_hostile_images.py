"""Uploads made to do harm: of other formats, damaged, too large, swollen."""

import json
import pickle
import random
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from PIL import Image

from serve.images import BadImage
from tests.serving.uploads import (
    FORMATS,
    MAX_PIXELS,
    SRGB,
    far,
    noise,
    picture,
    png,
    read,
    refusal,
    saved,
    with_chunks,
    with_segments,
)


def test_other_formats_are_refused_whatever_they_hold() -> None:
    others = [b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"<html><img src=x></html>", bytes(100)]
    others += [b"RIFF\x04\0\0\0WAVEfmt ", b"8BPS\0\x01", b"P6 9 9 255 ", b"%!PS-Adobe"]
    others += [saved(picture(), name) for name in ("GIF", "TIFF", "ICO", "BMP", "PDF", "JPEG2000")]
    others += [random.Random(seed).randbytes(seed * 10 + 1) for seed in range(50)]
    others += [b"GIF89a" + saved(picture()), b"\n" + saved(picture())]
    for data in others:
        assert "no PNG, JPEG or WebP" in refusal(data)
    assert "empty" in refusal(b"")
    assert "2000 bytes" in refusal(saved(noise(99, 99)), max_bytes=2000)


@pytest.mark.parametrize("format", FORMATS)
def test_no_part_of_a_file_is_a_file(format: str) -> None:
    whole = saved(picture(), format)
    assert far(read(whole), picture()) < 6
    for length in range(1, len(whole)):
        refusal(whole[:length])


@pytest.mark.parametrize("format", FORMATS)
def test_damaged_files_are_read_or_refused(format: str) -> None:
    """Nothing else is raised, no warning either, and no size is believed above the limit."""
    chance = random.Random(1)
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = saved(picture(), format, exif=exif, icc_profile=SRGB)
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(chance.randint(1, 6)):
            damaged[chance.randrange(len(damaged))] = chance.choice([0, 255, chance.randrange(256)])
        try:
            shown = read(bytes(damaged))
        except BadImage:
            continue
        assert shown.width * shown.height <= MAX_PIXELS


def too_large() -> list[bytes]:
    """Small files whose headers claim much; each is whole, and only too large."""
    jpeg, webp = saved(picture(), "JPEG"), saved(picture(), "WEBP")
    canvas = saved(picture(), "WEBP", icc_profile=SRGB)
    sof, sos = jpeg.index(b"\xff\xc0") + 5, jpeg.index(b"\xff\xda")
    return [
        png((60000, 60000), 8, 2, bytes(100)),
        png((2**31 - 1, 2**31 - 1), 1, 0, bytes(100)),
        jpeg[:sof] + b"\xff\xff\xff\xff" + jpeg[sof + 4 :],
        webp[:26] + b"\xff\x3f\xff\x3f" + webp[30:],
        canvas[:24] + b"\xff\xff\0\xff\xff\0" + canvas[30:],
        png((1025, 1024), 8, 2, bytes(100)),
        jpeg[:sos] + jpeg[sof - 5 : sof] + b"\xff" * 4 + jpeg[sof + 4 : sof + 14] + jpeg[sos:],
    ]


def swollen() -> list[bytes]:
    """Small pictures with much beside them."""
    plain, jpeg = saved(picture()), saved(picture(), "JPEG")
    text = zlib.compress(bytes(64 * 2**20), 9)
    wide = zlib.compress("\N{PILE OF POO}".encode() * 2**18, 9)  # four bytes each in memory
    exif, icc = b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"ICC_PROFILE\0"
    return [
        with_chunks(plain, *[(b"zTXt", b"a\0\0" + text)] * 40),
        with_chunks(plain, *[(b"iTXt", b"a\0\1\0\0\0" + text)] * 40),
        with_chunks(plain, *((b"iTXt", b"%d\0\1\0\0\0" % i + wide) for i in range(200))),
        with_chunks(plain, *[(b"tEXt", b"a\0b")] * 40_000),
        with_chunks(plain, (b"eXIf", exif[6:] + bytes(16 * 2**20))),
        with_segments(jpeg, *[(0xE1, exif + bytes(65000))] * 250),
        with_segments(jpeg, *((0xE2, icc + bytes([i, 250]) + bytes(65000)) for i in range(1, 251))),
        jpeg[:2] + b"\xff" * 2**20 + jpeg[2:-2] + b"\xff" * 22 * 2**20 + jpeg[-2:],
        saved(picture(), "WEBP", exif=bytes(16 * 2**20)),
    ]


CHILD = """
import json, pickle, resource, sys, time
from serve.images import BadImage, read_image

outcomes = []
for data in pickle.load(sys.stdin.buffer):
    started = time.process_time()
    try:
        read_image(data, "image", 24 * 2**20, 2**20)
        told = "taken"
    except BadImage as bad:
        told = str(bad)
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes.append((told, kib, time.process_time() - started))
print(json.dumps(outcomes))
"""


def test_bombs_take_neither_memory_nor_time() -> None:
    usual = [saved(picture(1024, 1024), format, icc_profile=SRGB) for format in FORMATS]
    profile = (b"iCCP", b"a\0\0" + zlib.compress(bytes(2**26), 9))
    header = (b"IHDR", struct.pack(">IIBBBBB", 9, 9, 8, 2, 0, 0, 0))  # another than the first
    refused = [with_chunks(png((9, 8), 8, 2, bytes(999)), more) for more in (profile, header)]
    large, fat = too_large(), swollen()
    made = sorted([*refused, *large, *fat], key=len)
    command, root = [sys.executable, "-W", "error", "-c", CHILD], Path(__file__).parents[2]
    given = pickle.dumps([*usual, *made])
    answer = subprocess.run(command, input=given, stdout=subprocess.PIPE, check=True, cwd=root)
    outcomes = json.loads(answer.stdout)
    usual_kib = outcomes[len(usual) - 1][1]
    for data, (told, kib, seconds) in zip(made, outcomes[len(usual) :], strict=True):
        assert kib - usual_kib < 4 * len(data) / 1024 + 2**13
        assert seconds < 1.5
        assert ("pixels" in told) == (data in large)
        assert (told == "taken") == (data in fat)


def test_files_of_too_many_parts_are_refused() -> None:
    plain, jpeg = saved(picture()), saved(picture(), "JPEG", progressive=True)
    scan = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    assert "too many parts" in refusal(with_chunks(plain, *[(b"tEXt", b"")] * 60_000))
    assert "too many parts" in refusal(with_segments(jpeg, *[(0xFE, b"")] * 60_000))
    assert "too many parts" in refusal(jpeg[:-2] + scan * 200 + jpeg[-2:])
