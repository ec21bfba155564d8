"""Training images: which files of a folder count, and how each is opened.

Owns the description of an image (`Photo`), which is found once, at a run's entrance, and can be
read on any machine. A file is first decoded in a sandbox, and in this process when it has passed.
Knows no torch.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageChops

from rayjobs import storage
from rayjobs.config import BadInput
from rayjobs.dataset.lock import lock_uri
from rayjobs.dataset.reader import Reader
from rayjobs.dataset.records import SYNTAX
from rayjobs.diffusion.text.syntax import spoken
from rayjobs.dreambooth.data.captions import Captions, find_masks, folders_with_repeats, read_beside
from rayjobs.images.container import UnreadableImage
from rayjobs.images.decode import Picture, decode
from rayjobs.images.sandbox import Sandbox

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".jp2"}
SUFFIXES |= {".jfif", ".jpe"}
UNREADABLE = {".heic", ".heif", ".svg", ".raw", ".dng", ".cr2", ".nef", ".arw", ".psd", ".pdf"}
MAX_DISTORTION = 0.02
"""Of a mask that is stretched over its picture, as a logarithm."""
A_MASK = "a mask; train.masks=files uses it"
MAX_TOLD = 5
"""Names in a warning."""
MAX_ENLARGEMENT = 4.0


@dataclass(frozen=True)
class Photo:
    """One training image: where its bytes are, its captions and its upright size in pixels.

    It names storage, not a path of this machine, so that workers elsewhere read the same image.
    """

    name: str
    folder: str
    """The URI of the folder that it was found in."""
    file: str
    """Below `folder`: an image, or a parquet shard of records."""
    row: int | None
    """The record's row in the shard; None for an image file."""
    captions: Captions
    """One of them is chosen each time that the image is used."""
    sha256: str
    width: int
    height: int
    mask: str = ""
    """The file below `folder` that says where its loss counts; empty without one."""
    mask_sha256: str = ""

    def read(self) -> bytes:
        """The encoded image. Raises BadInput when it is not the one that was found."""
        path = _local_copy(self.folder) / self.file
        data = path.read_bytes() if self.row is None else _read_record(path, self.row)
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise BadInput(
                f"{self.name}: changed while the run uses it; restore it, or start a run of "
                "another name"
            )
        return data

    def open(self) -> Image.Image:
        """The image: RGB, upright. Raises BadInput naming the file."""
        return _decode(self.read(), self.name, decode).on_white()

    def open_alpha(self) -> Image.Image | None:
        """Where the image is opaque (L), upright; None where it is so everywhere."""
        return _decode(self.read(), self.name, decode).alpha

    def open_mask(self) -> Image.Image | None:
        """The mask's file (L), upright; None without one. What is transparent is not painted."""
        if not self.mask:
            return None
        data = (_local_copy(self.folder) / self.mask).read_bytes()
        if hashlib.sha256(data).hexdigest() != self.mask_sha256:
            raise BadInput(f"{self.mask}: changed while the run uses it; restore it")
        picture = _decode(data, self.mask, decode)
        bright = picture.colours.convert("L")
        return bright if picture.alpha is None else ImageChops.multiply(bright, picture.alpha)


@dataclass(frozen=True)
class Subject:
    """What a run learns, or one of several such, with the class that it is to keep."""

    prompt: str
    class_prompt: str
    photos: tuple[Photo, ...]
    class_uri: str
    """Where its class images are, or are to be made."""
    has_own_class: bool
    """Whether that place was given, and may hold pictures of any origin."""
    class_images: tuple[Photo, ...] = ()
    repeats: int = 1


@lru_cache(maxsize=16)
def _local_copy(folder: str) -> Path:
    """The folder on this machine: itself, or the one copy that is downloaded for all processes."""
    return storage.fetch(folder)


def _forget() -> None:
    """What an earlier run in this process has read may have changed since."""
    _local_copy.cache_clear()
    _row_groups.cache_clear()


def _read_record(path: Path, row: int) -> bytes:
    shard, starts = _row_groups(path)
    group = int(np.searchsorted(starts, row, side="right")) - 1
    rows = shard.read_row_group(group, columns=["image"]).column("image")
    data: bytes = rows[row - int(starts[group])]["bytes"].as_py()
    return data


@lru_cache(maxsize=64)
def _row_groups(path: Path) -> tuple[pq.ParquetFile, np.ndarray]:
    """A shard, and the first row of each of its row groups."""
    shard = pq.ParquetFile(path)
    counts = [shard.metadata.row_group(i).num_rows for i in range(shard.num_row_groups)]
    return shard, np.cumsum([0, *counts[:-1]])


@dataclass(frozen=True)
class Found:
    """The pictures of a place, and what was passed over there."""

    photos: list[Photo]
    skipped: dict[str, str]
    """Why, by the file's name."""


def find_photos(uri: str, caption: str) -> list[Photo]:
    """The pictures of `look_for_photos`."""
    return look_for_photos(uri, caption).photos


def look_for_photos(uri: str, caption: str) -> Found:
    """Every image below `uri` (a folder, or a data set of the generation job), by name.

    Images without a caption of their own get `caption`. Raises BadInput naming a file that cannot
    be used, or when there is none.
    """
    _forget()
    if storage.exists(lock_uri(uri)):
        return Found(_find_records(uri), {})
    if not storage.is_folder(uri):
        raise BadInput(f"{uri}: no such folder of pictures")
    folder = _local_copy(uri)
    paths = sorted(path for path in folder.rglob("*") if not _is_hidden(path, folder))
    files = [path.relative_to(folder).as_posix() for path in paths if path.is_file()]
    broken = [path.relative_to(folder).as_posix() for path in paths if not path.exists()]
    for name in files:
        suffix = Path(name).suffix.lower()
        if suffix in UNREADABLE:
            raise BadInput(f"{Path(name).name}: {suffix} pictures cannot be read; save it as png")
    pictures = [name for name in files if Path(name).suffix.lower() in SUFFIXES]
    masks = find_masks(pictures)
    pictures = [name for name in pictures if name not in masks]
    if not pictures:
        known = " ".join(sorted(SUFFIXES))
        raise BadInput(f"{uri}: no pictures in it (looked for {known})")
    beside = read_beside(folder, [name for name in files if name not in masks], pictures)
    mask_of = {picture: mask for mask, owners in masks.items() for picture in owners}
    photos = [
        _describe(uri, name, folder, beside.captions.get(name, (caption,)), mask_of.get(name, ""))
        for name in pictures
    ]
    passed_over = dict.fromkeys(masks, A_MASK) | dict.fromkeys(broken, "a broken link")
    return Found(photos, beside.skipped | passed_over | folders_with_repeats(pictures))


def tell_skipped(skipped: dict[str, str]) -> list[str]:
    """A warning for each reason, with a few of the names."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        by_reason.setdefault(reason, []).append(name)
    return [f"passed over, {reason}: {shortened(names)}" for reason, names in by_reason.items()]


def shortened(names: list[str]) -> str:
    more = f" and {len(names) - MAX_TOLD} more" if len(names) > MAX_TOLD else ""
    return ", ".join(names[:MAX_TOLD]) + more


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _decode(data: bytes, name: str, decode: Callable[[bytes], Picture]) -> Picture:
    """A picture of 8 bits, upright, in sRGB."""
    try:
        return decode(data)
    except UnreadableImage as error:
        raise BadInput(f"{name}: {error}") from None


def _describe(uri: str, name: str, folder: Path, captions: Captions, mask: str) -> Photo:
    data = (folder / name).read_bytes()
    size = _decode(data, name, _sandbox().decode).colours.size
    sha256 = hashlib.sha256(data).hexdigest()
    photo = Photo(name, uri, name, None, captions, sha256, *size)
    if not mask:
        return photo
    data = (folder / mask).read_bytes()
    of_mask = _decode(data, mask, _sandbox().decode).colours.size
    if abs(math.log(of_mask[0] * size[1] / of_mask[1] / size[0])) > MAX_DISTORTION:
        raise BadInput(
            f"{mask}: a mask of {of_mask[0]} x {of_mask[1]} pixels for a picture of {size[0]} x "
            f"{size[1]}; give it the picture's shape"
        )
    return replace(photo, mask=mask, mask_sha256=hashlib.sha256(data).hexdigest())


@cache
def _sandbox() -> Sandbox:
    return Sandbox()


def _find_records(uri: str) -> list[Photo]:
    """The good records of a data set's committed shards, in the records' order."""
    reader = Reader(uri)
    if reader.lock.format != "parquet":
        raise BadInput(
            f"{uri}: no parquet shards; give a data set in parquet, or `rayjobs export` it"
        )
    columns = ["record", "prompt", SYNTAX.name, "status", "image_sha256", "width", "height"]
    data, photos = storage.join(uri, "data"), []
    for entry in reader.entries:
        file = entry["file"].removeprefix("data/")
        for number, row in enumerate(reader.read_shard(entry, columns)):
            if row["status"] == "ok":
                name = f"{file}, record {row['record']}"
                captions = (spoken(row["prompt"], row[SYNTAX.name]),)
                size = (row["width"], row["height"])
                photos.append(Photo(name, data, file, number, captions, row["image_sha256"], *size))
    return photos


def check_sizes(photos: Sequence[Photo], side: int) -> list[str]:
    """Warnings for pictures to be enlarged; raises BadInput for one that is far too small."""
    warnings = []
    for photo in photos:
        factor = side / (photo.width * photo.height) ** 0.5
        size = f"{photo.name}: {photo.width} x {photo.height} pixels"
        if factor > MAX_ENLARGEMENT:
            raise BadInput(f"{size} are far too few to train at {side}; give a larger picture")
        if factor > 1:
            warnings.append(f"{size}; enlarged by {factor:.2g} for training at {side}")
    return warnings
