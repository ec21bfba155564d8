"""Uploads of strangers, most of them hostile, and the answers' bytes."""

import io
import json
import pickle
import random
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops, ImageCms, ImageOps, ImageStat

from serve.images import BadImage, encode, fitted, read_image, read_mask, to_image, to_pixels
from serve.protocol import Pixels

MOST_BYTES, MOST_PIXELS = 24 * 2**20, 2**20
FORMATS = ["PNG", "JPEG", "WEBP"]
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def saved(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def read(data: bytes) -> Image.Image:
    return to_image(read_image(data, "image", MOST_BYTES, MOST_PIXELS))


def refusal(data: bytes, most_bytes: int = MOST_BYTES) -> str:
    """What is told of a bad upload: what to do about it, and nothing of this machine."""
    with pytest.raises(BadImage) as caught:
        read_image(data, "image", most_bytes, MOST_PIXELS)
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


def test_uploads_come_as_they_are() -> None:
    grey, cmyk = picture().convert("L"), picture().convert("CMYK")
    for image in (noise(37, 23), picture(1, 1), picture(300, 1), grey):
        assert far(read(saved(image)), image) == 0
        assert far(read(saved(image, "WEBP", lossless=True)), image) == 0
    for image in (picture(), grey, cmyk):
        for progressive in (False, True):
            data = saved(image, "JPEG", quality=98, progressive=progressive)
            assert far(read(data), image) < 3


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("orientation", range(10))
def test_uploads_are_upright(format: str, orientation: int) -> None:
    for endian in "<>":
        exif = Image.Exif()
        exif.endian = endian
        exif[0x010E], exif[0x0112] = "a picture", orientation
        data = saved(picture(), format, exif=exif)
        assert far(read(data), ImageOps.exif_transpose(Image.open(io.BytesIO(data)))) == 0


def test_an_orientation_may_be_a_long_number() -> None:
    exif = b"MM\0*" + struct.pack(">IHHHII", 8, 1, 0x0112, 4, 1, 6)
    assert read(saved(picture(), exif=exif)).size == (32, 48)


def test_transparent_is_white() -> None:
    alpha = Image.linear_gradient("L").resize((48, 32))
    rgba, grey = picture(), picture().convert("L")
    rgba.putalpha(alpha)
    grey.putalpha(alpha)
    for image, format in ((rgba, "PNG"), (grey, "PNG"), (rgba, "WEBP")):
        wanted = Image.composite(image.convert("RGB"), Image.new("RGB", (48, 32), "white"), alpha)
        assert far(read(saved(image, format, lossless=True)), wanted) < 1


def test_palettes() -> None:
    palette = picture().quantize(16)
    assert far(read(saved(palette)), palette) == 0
    index = palette.getpixel((0, 0))
    for transparency in (index, bytes(0 if i == index else 255 for i in range(16))):
        shown = read(saved(palette, transparency=transparency))
        assert shown.getpixel((0, 0)) == (255, 255, 255)
        assert shown.getpixel((47, 31)) == palette.convert("RGB").getpixel((47, 31))


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_greys_of_each_depth(depth: int) -> None:
    """Black, white and a shade; then with one of them as the transparent colour."""
    top = 2**depth - 1
    values = [0, top, top * 2 // 3 + (depth == 16)]
    shades = [0, 255, 170 if depth > 1 else 0]
    bits = "".join(f"{value:0{depth}b}" for value in values).ljust(48, "0")
    rows = b"\0" + int(bits, 2).to_bytes(6)[: -(-3 * depth // 8)]
    assert row(read(png((3, 1), depth, 0, rows))) == [(shade,) * 3 for shade in shades]
    for key in values[::2]:
        shown = row(read(png((3, 1), depth, 0, rows, struct.pack(">H", key))))
        pairs = zip(values, shades, strict=True)
        assert shown == [(255 if value == key else shade,) * 3 for value, shade in pairs]


def test_colours_of_16_bits() -> None:
    colours = [(200, 257 * 100, 65535), (0x7F0, 0x801, 0x9FF)]
    rows = b"\0" + b"".join(struct.pack(">HHH", *colour) for colour in colours)
    key = struct.pack(">HHH", *colours[1])
    assert row(read(png((2, 1), 16, 2, rows))) == [(0, 100, 255), (7, 8, 9)]
    assert row(read(png((2, 1), 16, 2, rows, key))) == [(0, 100, 255), (255, 255, 255)]
    rows = b"\0" + struct.pack(">HHHH", 0x9FF, 65535, 0x901, 0)
    assert row(read(png((2, 1), 16, 4, rows))) == [(9, 9, 9), (255, 255, 255)]


@pytest.mark.parametrize("format", FORMATS)
def test_profiles(format: str) -> None:
    """One whose red and green are swapped swaps them; those that make no sense change nothing."""
    swapped = SRGB.replace(b"rXYZ", b"?XYZ").replace(b"gXYZ", b"rXYZ").replace(b"?XYZ", b"gXYZ")
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    options: dict[str, Any] = {"quality": 98} if format == "JPEG" else {"lossless": True}
    red, green, blue = picture().split()
    shown = read(saved(picture(), format, icc_profile=swapped, **options))
    assert far(shown, Image.merge("RGB", (green, red, blue))) < 4
    for profile in (SRGB, lab, b"\xff" * 600, SRGB[:300], swapped + bytes(5 * 2**20)):
        if format != "PNG" or len(profile) < 2**20:
            file = saved(picture(), format, icc_profile=profile, **options)
            assert far(read(file), picture()) < 2
    grey = saved(picture().convert("L"), format, icc_profile=swapped, **options)
    assert far(read(grey), picture().convert("L")) < 2


def test_what_is_appended_or_beside_the_picture_is_not_looked_at() -> None:
    appended = b"PK\x03\x04" + b"\xff\xda\xff\xd9%PDF-1.7 <svg/>" * 1000
    for format in FORMATS:
        assert far(read(saved(picture(), format) + appended), picture()) < 6
    mpo = saved(picture(), "MPO", save_all=True, append_images=[noise(8, 8)])
    assert far(read(mpo), picture()) < 6
    jpeg = saved(picture(), "JPEG")
    long = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\xff\xff\xff\xff\xff\xff\xff\xff"
    for marker, body in ((0xE2, b"MPF\0broken"), (0xE1, long), (0xE1, b"Exif\0\0"), (0xFE, b"")):
        assert far(read(with_segments(jpeg, (marker, body))), picture()) < 6
    one_frame = with_chunks(saved(picture()), (b"acTL", struct.pack(">II", 1, 0)))
    assert far(read(one_frame), picture()) == 0


def test_other_formats_are_refused_whatever_they_hold() -> None:
    others = [b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"<html><img src=x></html>", bytes(100)]
    others += [b"RIFF\x04\0\0\0WAVEfmt ", b"8BPS\0\x01", b"P6 9 9 255 ", b"%!PS-Adobe"]
    others += [saved(picture(), name) for name in ("GIF", "TIFF", "ICO", "BMP", "PDF", "JPEG2000")]
    others += [random.Random(seed).randbytes(seed * 10 + 1) for seed in range(50)]
    others += [b"GIF89a" + saved(picture()), b"\n" + saved(picture())]
    for data in others:
        assert "no PNG, JPEG or WebP" in refusal(data)
    assert "empty" in refusal(b"")
    assert "2000 bytes" in refusal(saved(noise(99, 99)), most_bytes=2000)


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
        assert shown.width * shown.height <= MOST_PIXELS


def test_of_an_animation_the_first_frame_is_taken() -> None:
    for format in ("PNG", "WEBP"):
        frames = {"save_all": True, "append_images": [noise(48, 32)]}
        data = saved(picture(), format, lossless=True, **frames)
        assert far(read(data), picture()) == 0


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


def mask_of(data: bytes) -> Image.Image:
    return to_image(read_mask(data, (48, 32), MOST_BYTES, MOST_PIXELS))


def test_masks() -> None:
    """With alpha, transparent is changed; without, white is."""
    ramp = Image.linear_gradient("L").resize((48, 32))
    rgba = picture()
    rgba.putalpha(ramp)
    for data in (saved(rgba), saved(rgba, "WEBP", lossless=True), saved(rgba.convert("LA"))):
        assert mask_of(data).tobytes() == ImageOps.invert(ramp).tobytes()
    for data in (saved(ramp), saved(ramp.convert("RGB")), saved(ramp, icc_profile=SRGB)):
        assert mask_of(data).tobytes() == ramp.tobytes()
    assert mask_of(saved(ramp.convert("1"))).tobytes() == ramp.convert("1").convert("L").tobytes()
    assert far(mask_of(saved(ramp, "JPEG", quality=98)), ramp) < 2
    assert far(mask_of(saved(ramp.convert("CMYK"), "JPEG", quality=98)), ramp) < 3
    palette = saved(picture().quantize(4), transparency=bytes([0, 255, 100, 255]))
    assert {value for _, value in mask_of(palette).getcolors() or []} == {255, 0, 155}
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = ramp.transpose(Image.Transpose.ROTATE_90)
    assert mask_of(saved(turned, exif=exif)).tobytes() == ramp.tobytes()


def test_bad_masks() -> None:
    for data, told in (
        (saved(picture(32, 48)), "32x48 and the image 48x32"),
        (saved(Image.new("RGBA", (48, 32), (9, 9, 9, 255))), "no transparent pixel"),
        (saved(Image.new("L", (48, 32))), "no white pixel"),
        (saved(picture())[:-9], "cut off"),
        (b"<svg/>", "no PNG"),
    ):
        with pytest.raises(BadImage, match=told) as caught:
            mask_of(data)
        again = pickle.loads(pickle.dumps(caught.value))
        assert (str(again), again.param) == (str(caught.value), "mask")


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_fitted(mode: str) -> None:
    """What covers is scaled evenly; what is cropped goes from both sides alike."""
    pixels = to_pixels(picture(200, 100).convert(mode))
    assert fitted(pixels, 200, 100) is pixels
    shown = to_image(fitted(pixels, 64, 64))
    middle = picture(200, 100).crop((50, 0, 150, 100)).resize((64, 64)).convert(mode)
    assert (shown.mode, shown.size) == (mode, (64, 64))
    assert far(shown, middle) < 2
    for width, height in ((1, 1), (1, 900), (900, 1), (7, 500)):
        odd = fitted(to_pixels(noise(width, height).convert(mode)), 72, 40)
        assert (odd.width, odd.height, odd.mode) == (72, 40, mode)
        assert len(odd.data) == 72 * 40 * len(mode)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_answers(mode: str) -> None:
    pixels = to_pixels(picture().convert(mode))
    assert vars(pixels) == vars(Pixels(48, 32, picture().convert(mode).tobytes(), mode))
    assert vars(to_pixels(to_image(pixels))) == vars(pixels)
    for format, most in (("png", 0), ("jpeg", 3), ("webp", 3)):
        data = encode(pixels, format, 100)
        assert data == encode(pixels, format, 100)
        shown = Image.open(io.BytesIO(data))
        assert shown.format == format.upper()
        assert far(shown, to_image(pixels)) <= most
        assert not set(shown.info) & {"exif", "icc_profile", "xmp", "comment"}
    large = to_pixels(noise(128, 128))
    for format in ("jpeg", "webp"):
        sizes = [len(encode(large, format, compression)) for compression in (-5, 0, 1, 50, 98, 200)]
        assert sizes[0] == sizes[1] == sizes[2] < sizes[3] < sizes[4] < sizes[5]
    assert encode(large, "png", 0) == encode(large, "png", 100)


def test_threads_do_not_mix() -> None:
    images = [noise(160, 120, seed=seed) for seed in range(8)]
    files = [saved(image, icc_profile=SRGB) for image in images]

    def turn(number: int) -> bool:
        if number % 3 == 2:
            return "no PNG" in refusal(b"GIF89a")
        return far(read(files[number % 8]), images[number % 8]) < 1

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(turn, range(200)))
