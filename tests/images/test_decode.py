"""Pictures of phones, scanners and strangers: upright, sRGB and opaque, or refused."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageChops, ImageCms

from rayjobs.images.container import UnreadableImage
from rayjobs.images.decode import decode, open_image, open_mask

STORED_AS = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    6: Image.Transpose.ROTATE_90,
    8: Image.Transpose.ROTATE_270,
}
"""How the pixels of an upright picture lie in a file of each orientation."""


def opened(data: bytes) -> Image.Image:
    return decode(data).on_white()


def encode(image: Image.Image, image_format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def exif(orientation: int) -> Image.Exif:
    made = Image.Exif()
    made[0x0112] = orientation
    return made


def wide(picture: Callable[[int], Image.Image], number: int = 0) -> Image.Image:
    return picture(number).crop((0, 0, 60, 40))


def png(size: tuple[int, int], depth: int, color: int, data: bytes) -> bytes:
    """A PNG file of any kind; `data` are its rows, each after a zero."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", *size, depth, color, 0, 0, 0))]
    chunks += [(b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(body)) + tag + body + struct.pack(">I", zlib.crc32(tag + body))
        for tag, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def swapped_profile() -> bytes:
    """An RGB profile like sRGB's, but with red and blue exchanged."""
    data = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return data.replace(b"rXYZ", b"....").replace(b"bXYZ", b"rXYZ").replace(b"....", b"bXYZ")


def frames(picture: Callable[[int], Image.Image]) -> dict[str, Any]:
    return {"save_all": True, "append_images": [picture(1), picture(2)]}


def refusal(data: bytes) -> str | None:
    try:
        opened(data)
    except UnreadableImage as error:
        return str(error)
    return None


def is_near(image: Image.Image, other: Image.Image, most: int = 12) -> bool:
    difference = ImageChops.difference(image, other)
    return image.size == other.size and float(np.asarray(difference).mean()) < most


@pytest.mark.parametrize("orientation", STORED_AS)
def test_phone_pictures_are_turned_upright(
    orientation: int, picture: Callable[[int], Image.Image]
) -> None:
    upright = wide(picture)
    turn = STORED_AS[orientation]
    stored = upright if turn is None else upright.transpose(turn)
    data = encode(stored, exif=exif(orientation))
    assert opened(data).tobytes() == upright.tobytes()
    jpeg = encode(stored, "JPEG", quality=95, exif=exif(orientation))
    assert is_near(opened(jpeg), upright)


def test_a_picture_of_24_megapixels_opens() -> None:
    data = encode(Image.new("RGB", (6000, 4000), (90, 60, 30)), "JPEG")
    image = opened(data)
    assert (image.size, image.mode) == ((6000, 4000), "RGB")


def test_a_picture_of_a_billion_pixels_is_refused_by_its_header() -> None:
    with pytest.raises(UnreadableImage, match=r"^is 32000x32000 pixels; make it 178956970"):
        opened(png((32000, 32000), 1, 0, b""))
    bmp = bytearray(encode(Image.new("RGB", (4, 4)), "BMP"))
    bmp[18:26] = struct.pack("<ii", 32000, 32000)
    with pytest.raises(UnreadableImage, match="too many pixels"):
        opened(bytes(bmp))


def test_what_is_transparent_becomes_white() -> None:
    half = Image.new("RGBA", (4, 2), (200, 0, 0, 255))
    half.paste((0, 0, 0, 0), (2, 0, 4, 2))
    half.putpixel((0, 1), (0, 0, 0, 128))
    image = opened(encode(half))
    assert image.mode == "RGB"
    assert [image.getpixel(at) for at in ((0, 0), (3, 0), (0, 1))] == [
        (200, 0, 0),
        (255, 255, 255),
        (127, 127, 127),
    ]
    grey = Image.merge("LA", [Image.new("L", (2, 2), 9), Image.new("L", (2, 2), 0)])
    assert opened(encode(grey)).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("image_format", ["PNG", "GIF"])
def test_a_transparent_colour_of_a_palette_becomes_white(image_format: str) -> None:
    image = Image.new("P", (4, 2), 1)
    image.putpalette([0, 0, 0, 10, 120, 30])
    image.putpixel((3, 1), 0)
    shown = opened(encode(image, image_format, transparency=0))
    assert shown.getpixel((0, 0)) == (10, 120, 30)
    assert shown.getpixel((3, 1)) == (255, 255, 255)


def test_a_transparent_colour_without_palette_becomes_white() -> None:
    image = Image.new("RGB", (2, 2), (1, 2, 3))
    image.putpixel((1, 1), (9, 9, 9))
    shown = opened(encode(image, transparency=(1, 2, 3)))
    assert shown.getpixel((0, 0)) == (255, 255, 255)
    assert shown.getpixel((1, 1)) == (9, 9, 9)


@pytest.mark.parametrize("image_format", ["JPEG", "TIFF"])
def test_ink_becomes_light(image_format: str) -> None:
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    pixel = np.array(opened(encode(image, image_format)).getpixel((8, 8)))
    assert np.abs(pixel - (255, 0, 0)).max() <= 3


@pytest.mark.parametrize("image_format", ["PNG", "TIFF"])
def test_greys_of_16_bits_are_scaled_not_cut(image_format: str) -> None:
    values = np.full((4, 6), 40000, np.uint16)
    values[0] = (0, 256, 257, 32896, 65534, 65535)
    shades = np.asarray(opened(encode(Image.fromarray(values), image_format)))
    assert shades.shape == (4, 6, 3)
    assert shades[0, :, 0].tolist() == [0, 1, 1, 128, 255, 255]
    assert (shades[1:] == 156).all()


def test_greys_out_of_range_are_refused() -> None:
    for values in (np.full((4, 4), 0.5, np.float32), np.full((4, 4), 70000, np.int32)):
        with pytest.raises(UnreadableImage, match="grey values of neither 8 nor 16 bits"):
            opened(encode(Image.fromarray(values), "TIFF"))


def test_colours_of_16_bits_become_8() -> None:
    row = b"\0" + struct.pack(">6H", 40000, 0, 65535, 25700, 51400, 128)
    image = opened(png((2, 2), 16, 2, row * 2))
    values = np.asarray(image).astype(int)
    expected = [[155, 0, 255], [100, 200, 0]]
    assert np.abs(values - [expected, expected]).max() <= 1


def test_one_bit_is_black_and_white() -> None:
    image = Image.new("1", (8, 2), 0)
    image.putpixel((7, 0), 255)
    shown = opened(encode(image))
    assert [shown.getpixel(at) for at in ((0, 0), (7, 0))] == [(0, 0, 0), (255, 255, 255)]


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_moving_pictures_the_first_is_taken(
    image_format: str, picture: Callable[[int], Image.Image]
) -> None:
    options = {"lossless": True} if image_format == "WEBP" else {}
    data = encode(picture(0), image_format, **frames(picture), **options)
    expected = opened(encode(picture(0), image_format, **options))
    assert is_near(opened(data), expected, most=1)


def test_a_still_gif_is_taken(picture: Callable[[int], Image.Image]) -> None:
    assert is_near(opened(encode(picture(0), "GIF")), picture(0))


def test_of_a_cameras_several_pictures_the_first_is_taken(
    picture: Callable[[int], Image.Image],
) -> None:
    data = encode(picture(0), "MPO", quality=95, **frames(picture))
    assert is_near(opened(data), picture(0))


@pytest.mark.parametrize(
    "image_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000"]
)
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_picture_cut_off_is_refused(
    image_format: str, share: float, picture: Callable[[int], Image.Image]
) -> None:
    data = encode(picture(0), image_format)
    with pytest.raises(UnreadableImage, match=r"^(is cut off|cannot be decoded|is no picture)"):
        opened(data[: int(share * len(data))])


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "AVIF"])
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_picture_opens_or_is_refused(
    image_format: str, picture: Callable[[int], Image.Image]
) -> None:
    whole = encode(picture(0), image_format, exif=exif(6))
    moving = encode(picture(0), image_format, **frames(picture)) if image_format == "GIF" else whole
    rng = np.random.default_rng(0)
    for data in (whole, moving):
        for _ in range(40):
            hurt = np.frombuffer(data, np.uint8).copy()
            places = rng.integers(0, min(len(hurt), 300), 3)
            hurt[places] = rng.integers(0, 256, 3)
            told = refusal(hurt[: rng.integers(1, len(hurt) + 1)].tobytes())
            assert told is None or ";" in told


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colours_of_another_profile_become_srgb(mode: str) -> None:
    image = Image.new("RGB", (8, 8), (255, 0, 0)).convert(mode)
    plain = opened(encode(image))
    assert plain.getpixel((4, 4)) == (255, 0, 0)
    profiled = opened(encode(image, icc_profile=swapped_profile()))
    assert np.abs(np.array(profiled.getpixel((4, 4))) - (0, 0, 255)).max() <= 4


def test_a_profile_leaves_transparency_alone() -> None:
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    profiled = opened(encode(image, icc_profile=swapped_profile()))
    assert profiled.getpixel((4, 4)) == (255, 255, 255)


def test_the_usual_profile_moves_no_colour(picture: Callable[[int], Image.Image]) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    shown = opened(encode(picture(0), icc_profile=profile))
    assert np.asarray(ImageChops.difference(shown, picture(0))).max() <= 2


def test_a_broken_profile_is_passed_over(picture: Callable[[int], Image.Image]) -> None:
    for profile in (b"no profile at all", swapped_profile()[:200]):
        shown = opened(encode(picture(0), icc_profile=profile))
        assert shown.tobytes() == picture(0).tobytes()


def test_a_mask_is_what_is_transparent_or_else_what_is_white() -> None:
    ramp = Image.linear_gradient("L").resize((8, 8))
    with_alpha = Image.new("RGB", (8, 8), "white")
    with_alpha.putalpha(ramp)
    assert open_mask(encode(with_alpha)).tobytes() == ImageChops.invert(ramp).tobytes()
    opaque = ramp.convert("RGBA")
    for source in (encode(opaque), opaque, encode(ramp), ramp, ramp.convert("RGB")):
        assert open_mask(source).tobytes() == ramp.tobytes()


def test_an_image_in_memory_is_treated_as_its_file(
    picture: Callable[[int], Image.Image], tmp_path: Path
) -> None:
    hidden = picture(0).convert("RGBA")
    hidden.putalpha(0)
    deep = Image.fromarray(np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8))
    for image in (picture(0), hidden, deep, picture(0).convert("CMYK")):
        file = encode(image, "TIFF" if image.mode == "CMYK" else "PNG")
        (tmp_path / "a").write_bytes(file)
        pixels = open_image(file).tobytes()
        assert open_image(image).tobytes() == pixels
        assert open_image(str(tmp_path / "a")).tobytes() == pixels
        assert open_image(Image.open(io.BytesIO(file))).tobytes() == pixels


def test_an_init_image_that_cannot_be_opened_names_no_path(tmp_path: Path) -> None:
    (tmp_path / "cut.png").write_bytes(encode(Image.new("RGB", (9, 9)))[:40])
    for name, reason in (("none.png", "no such file"), ("cut.png", "cut off"), ("", "directory")):
        with pytest.raises(ValueError, match=f"^init image cannot be read: .*{reason}") as caught:
            open_image(str(tmp_path / name))
        assert str(tmp_path) not in str(caught.value)
