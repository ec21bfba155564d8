"""Pictures that callers upload, of every kind, and the answers' bytes."""

import io
import pickle
import struct
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageCms, ImageOps

from serve.images import BadImage, encode, fitted, read_mask, to_image, to_pixels
from serve.protocol import Pixels
from tests.serving.uploads import (
    FORMATS,
    MAX_BYTES,
    MAX_PIXELS,
    SRGB,
    far,
    noise,
    picture,
    png,
    read,
    refusal,
    row,
    saved,
    with_chunks,
    with_segments,
)


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


def test_of_an_animation_the_first_frame_is_taken() -> None:
    for format in ("PNG", "WEBP"):
        frames = {"save_all": True, "append_images": [noise(48, 32)]}
        data = saved(picture(), format, lossless=True, **frames)
        assert far(read(data), picture()) == 0


def mask_of(data: bytes) -> Image.Image:
    return to_image(read_mask(data, (48, 32), MAX_BYTES, MAX_PIXELS))


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


@pytest.mark.parametrize("size", [(200, 100), (50, 97), (33, 33), (301, 64), (72, 41)])
def test_fitted_as_a_job_does(size: tuple[int, int]) -> None:
    image = noise(*size)
    for width, height in ((64, 64), (96, 64), (72, 40)):
        shown = VaeImageProcessor().resize(image, height, width, resize_mode="crop")
        assert fitted(to_pixels(image), width, height).data == shown.tobytes()


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
