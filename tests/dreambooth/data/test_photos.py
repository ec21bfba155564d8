"""Photographs of phones, scanners and strangers: upright, sRGB and opaque, or refused."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageChops, ImageCms

from rayjobs.config import BadInput
from rayjobs.dreambooth.data.photos import Photo, check_sizes, find_photos, open_picture

SKS = "a photo of sks dog"
STORED_AS = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    6: Image.Transpose.ROTATE_90,
    8: Image.Transpose.ROTATE_270,
}
"""How the pixels of an upright picture lie in a file of each orientation."""


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
        open_picture(data, "dog.x")
    except BadInput as error:
        return str(error)
    return None


def is_near(image: Image.Image, other: Image.Image, most: int = 12) -> bool:
    difference = ImageChops.difference(image, other)
    return image.size == other.size and float(np.asarray(difference).mean()) < most


def sized(width: int, height: int) -> Photo:
    return Photo("dog.png", ".", "dog.png", None, (SKS,), "0" * 64, width, height)


@pytest.mark.parametrize("orientation", STORED_AS)
def test_phone_pictures_are_turned_upright(
    orientation: int, picture: Callable[[int], Image.Image], tmp_path: Path
) -> None:
    upright = wide(picture)
    turn = STORED_AS[orientation]
    stored = upright if turn is None else upright.transpose(turn)
    data = encode(stored, exif=exif(orientation))
    assert open_picture(data, "a.png").tobytes() == upright.tobytes()
    jpeg = encode(stored, "JPEG", quality=95, exif=exif(orientation))
    assert is_near(open_picture(jpeg, "a.jpg"), upright)
    (tmp_path / "dog.jpg").write_bytes(jpeg)
    (photo,) = find_photos(str(tmp_path), SKS)
    assert (photo.width, photo.height) == photo.open().size == (60, 40)


def test_a_picture_of_24_megapixels_opens() -> None:
    data = encode(Image.new("RGB", (6000, 4000), (90, 60, 30)), "JPEG")
    image = open_picture(data, "big.jpg")
    assert (image.size, image.mode) == ((6000, 4000), "RGB")


def test_a_picture_of_a_billion_pixels_is_told_as_such() -> None:
    with pytest.raises(BadInput, match=r"^huge\.png: too many pixels"):
        open_picture(png((32000, 32000), 1, 0, b""), "huge.png")


def test_small_pictures_are_told() -> None:
    assert check_sizes([sized(1024, 1024), sized(2000, 1000)], 1024) == []
    (warning,) = check_sizes([sized(512, 512)], 1024)
    assert warning == "dog.png: 512 x 512 pixels; enlarged by 2 for training at 1024"
    with pytest.raises(BadInput, match=r"dog\.png: 16 x 16 pixels are far too few"):
        check_sizes([sized(1024, 1024), sized(16, 16)], 1024)


def test_what_is_transparent_becomes_white() -> None:
    half = Image.new("RGBA", (4, 2), (200, 0, 0, 255))
    half.paste((0, 0, 0, 0), (2, 0, 4, 2))
    half.putpixel((0, 1), (0, 0, 0, 128))
    image = open_picture(encode(half), "a.png")
    assert image.mode == "RGB"
    assert [image.getpixel(at) for at in ((0, 0), (3, 0), (0, 1))] == [
        (200, 0, 0),
        (255, 255, 255),
        (127, 127, 127),
    ]
    grey = Image.merge("LA", [Image.new("L", (2, 2), 9), Image.new("L", (2, 2), 0)])
    assert open_picture(encode(grey), "a.png").getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("image_format", ["PNG", "GIF"])
def test_a_transparent_colour_of_a_palette_becomes_white(image_format: str) -> None:
    image = Image.new("P", (4, 2), 1)
    image.putpalette([0, 0, 0, 10, 120, 30])
    image.putpixel((3, 1), 0)
    opened = open_picture(encode(image, image_format, transparency=0), "a")
    assert opened.getpixel((0, 0)) == (10, 120, 30)
    assert opened.getpixel((3, 1)) == (255, 255, 255)


def test_a_transparent_colour_without_palette_becomes_white() -> None:
    image = Image.new("RGB", (2, 2), (1, 2, 3))
    image.putpixel((1, 1), (9, 9, 9))
    opened = open_picture(encode(image, transparency=(1, 2, 3)), "a.png")
    assert opened.getpixel((0, 0)) == (255, 255, 255)
    assert opened.getpixel((1, 1)) == (9, 9, 9)


@pytest.mark.parametrize("image_format", ["JPEG", "TIFF"])
def test_ink_becomes_light(image_format: str) -> None:
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    pixel = np.array(open_picture(encode(image, image_format), "a").getpixel((8, 8)))
    assert np.abs(pixel - (255, 0, 0)).max() <= 3


@pytest.mark.parametrize("image_format", ["PNG", "TIFF"])
def test_greys_of_16_bits_are_scaled_not_cut(image_format: str) -> None:
    values = np.full((4, 6), 40000, np.uint16)
    values[0] = (0, 256, 257, 32896, 65534, 65535)
    opened = np.asarray(open_picture(encode(Image.fromarray(values), image_format), "a"))
    assert opened.shape == (4, 6, 3)
    assert opened[0, :, 0].tolist() == [0, 0, 1, 128, 254, 255]
    assert (opened[1:] == 155).all()


def test_greys_out_of_range_are_refused() -> None:
    for values in (np.full((4, 4), 0.5, np.float32), np.full((4, 4), 70000, np.int32)):
        with pytest.raises(BadInput, match=r"^deep\.tiff: its grey values"):
            open_picture(encode(Image.fromarray(values), "TIFF"), "deep.tiff")


def test_colours_of_16_bits_become_8() -> None:
    row = b"\0" + struct.pack(">6H", 40000, 0, 65535, 25700, 51400, 128)
    image = open_picture(png((2, 2), 16, 2, row * 2), "a.png")
    opened = np.asarray(image).astype(int)
    expected = [[155, 0, 255], [100, 200, 0]]
    assert np.abs(opened - [expected, expected]).max() <= 1


def test_one_bit_is_black_and_white() -> None:
    image = Image.new("1", (8, 2), 0)
    image.putpixel((7, 0), 255)
    opened = open_picture(encode(image), "a.png")
    assert [opened.getpixel(at) for at in ((0, 0), (7, 0))] == [(0, 0, 0), (255, 255, 255)]


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_moving_pictures_are_refused(
    image_format: str, picture: Callable[[int], Image.Image]
) -> None:
    data = encode(picture(0), image_format, **frames(picture))
    with pytest.raises(BadInput, match=r"^dog\.x: 3 frames; a training picture has one"):
        open_picture(data, "dog.x")


def test_a_still_gif_is_taken(picture: Callable[[int], Image.Image]) -> None:
    assert is_near(open_picture(encode(picture(0), "GIF"), "a.gif"), picture(0))


def test_of_a_cameras_several_pictures_the_first_is_taken(
    picture: Callable[[int], Image.Image],
) -> None:
    data = encode(picture(0), "MPO", quality=95, **frames(picture))
    assert is_near(open_picture(data, "a.jpg"), picture(0))


@pytest.mark.parametrize(
    "image_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000"]
)
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_picture_cut_off_is_refused_by_name(
    image_format: str, share: float, picture: Callable[[int], Image.Image]
) -> None:
    data = encode(picture(0), image_format)
    with pytest.raises(BadInput, match=r"^dog\.x: (damaged or cut off|not a picture)"):
        open_picture(data[: int(share * len(data))], "dog.x")


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "AVIF"])
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_picture_opens_or_is_refused_by_name(
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
            assert told is None or told.startswith("dog.x: ")


def test_what_is_no_picture_is_refused_by_name(tmp_path: Path) -> None:
    for data in (b"", b"<html>not found</html>"):
        (tmp_path / "dog.png").write_bytes(data)
        with pytest.raises(BadInput, match=r"^dog\.png: not a picture"):
            find_photos(str(tmp_path), SKS)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colours_of_another_profile_become_srgb(mode: str) -> None:
    image = Image.new("RGB", (8, 8), (255, 0, 0)).convert(mode)
    plain = open_picture(encode(image), "a.png")
    assert plain.getpixel((4, 4)) == (255, 0, 0)
    profiled = open_picture(encode(image, icc_profile=swapped_profile()), "a.png")
    assert np.abs(np.array(profiled.getpixel((4, 4))) - (0, 0, 255)).max() <= 4


def test_a_profile_leaves_transparency_alone() -> None:
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    profiled = open_picture(encode(image, icc_profile=swapped_profile()), "a.png")
    assert profiled.getpixel((4, 4)) == (255, 255, 255)


def test_the_usual_profile_moves_no_colour(picture: Callable[[int], Image.Image]) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    opened = open_picture(encode(picture(0), icc_profile=profile), "a.png")
    assert np.asarray(ImageChops.difference(opened, picture(0))).max() <= 2


def test_a_broken_profile_is_passed_over(picture: Callable[[int], Image.Image]) -> None:
    for profile in (b"no profile at all", swapped_profile()[:200]):
        opened = open_picture(encode(picture(0), icc_profile=profile), "a.png")
        assert opened.tobytes() == picture(0).tobytes()


@pytest.mark.parametrize("name", ["dog.heic", "DOG.HEIC", "dog.svg", "dog.dng"])
def test_kinds_that_nobody_here_reads_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(BadInput, match=f"^{name}: .* cannot be read; save it as png"):
        find_photos(str(tmp_path), SKS)


def test_stray_files_are_passed_over(picture: Callable[[int], Image.Image], tmp_path: Path) -> None:
    stray = (".DS_Store", "Thumbs.db", "notes.md", "._dog.png", ".hidden/dog.png", "readme.txt")
    for name in stray:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"stray")
    picture(0).save(tmp_path / "dog.PNG")
    photos = find_photos(str(tmp_path), SKS)
    assert [(photo.name, photo.captions) for photo in photos] == [("dog.PNG", (SKS,))]
