"""Folders of photographs: which files count, and how a bad one is refused."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from rayjobs.config import BadInput
from rayjobs.dreambooth.data.photos import Photo, check_sizes, find_photos

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


def sized(width: int, height: int) -> Photo:
    return Photo("dog.png", ".", "dog.png", None, (SKS,), "0" * 64, width, height)


@pytest.mark.parametrize("orientation", STORED_AS)
def test_phone_pictures_are_turned_upright(
    orientation: int, picture: Callable[[int], Image.Image], tmp_path: Path
) -> None:
    upright = wide(picture)
    turn = STORED_AS[orientation]
    stored = upright if turn is None else upright.transpose(turn)
    (tmp_path / "dog.jpg").write_bytes(encode(stored, "JPEG", exif=exif(orientation)))
    (photo,) = find_photos(str(tmp_path), SKS)
    assert (photo.width, photo.height) == photo.open().size == (60, 40)


def test_small_pictures_are_told() -> None:
    assert check_sizes([sized(1024, 1024), sized(2000, 1000)], 1024) == []
    (warning,) = check_sizes([sized(512, 512)], 1024)
    assert warning == "dog.png: 512 x 512 pixels; enlarged by 2 for training at 1024"
    with pytest.raises(BadInput, match=r"dog\.png: 16 x 16 pixels are far too few"):
        check_sizes([sized(1024, 1024), sized(16, 16)], 1024)


def test_what_is_no_picture_is_refused_by_name(tmp_path: Path) -> None:
    for data in (b"", b"<html>not found</html>"):
        (tmp_path / "dog.png").write_bytes(data)
        with pytest.raises(BadInput, match=r"^dog\.png: is (empty|no picture).*; "):
            find_photos(str(tmp_path), SKS)


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
