"""Training images: which files of a folder count, how each is opened, and what its caption is.

Owns the description of an image (`Photo`), which is found once, at a run's entrance, and can be
read on any machine. A file is first decoded in a sandbox, and in this process when it has passed.
Knows no torch.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from rayjobs import storage
from rayjobs.config import BadInput
from rayjobs.dataset.lock import lock_uri
from rayjobs.dataset.reader import Reader
from rayjobs.dataset.records import SYNTAX
from rayjobs.diffusion.text.syntax import spoken
from rayjobs.images.container import UnreadableImage
from rayjobs.images.decode import Picture, decode
from rayjobs.images.sandbox import Sandbox

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".jp2"}
UNREADABLE = {".heic", ".heif", ".svg", ".raw", ".dng", ".cr2", ".nef", ".arw", ".psd", ".pdf"}
Captions = tuple[str, ...]
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
        return _decode(self.read(), self.name, decode)


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


def find_photos(uri: str, caption: str) -> list[Photo]:
    """Every image below `uri` (a folder, or a data set of the generation job), by name.

    Images without a caption of their own get `caption`. Raises BadInput naming a file that cannot
    be used, or when there is none.
    """
    _forget()
    if storage.exists(lock_uri(uri)):
        return _find_records(uri)
    if not storage.is_folder(uri):
        raise BadInput(f"{uri}: no such folder of pictures")
    folder = _local_copy(uri)
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not _is_hidden(p, folder))
    captions = _captions(folder, files)
    photos = []
    for path in files:
        if path.suffix.lower() in UNREADABLE:
            raise BadInput(f"{path.name}: {path.suffix} pictures cannot be read; save it as png")
        if path.suffix.lower() in SUFFIXES:
            name = path.relative_to(folder).as_posix()
            photos.append(_describe(uri, name, path, captions.get(name, (caption,))))
    if not photos:
        known = " ".join(sorted(SUFFIXES))
        raise BadInput(f"{uri}: no pictures in it (looked for {known})")
    return photos


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _decode(data: bytes, name: str, decode: Callable[[bytes], Picture]) -> Image.Image:
    """An RGB picture of 8 bits, upright, in sRGB, on white where it was transparent."""
    try:
        return decode(data).on_white()
    except UnreadableImage as error:
        raise BadInput(f"{name}: {error}") from None


def _describe(uri: str, name: str, path: Path, captions: Captions) -> Photo:
    data = path.read_bytes()
    image = _decode(data, name, _sandbox().decode)
    sha256 = hashlib.sha256(data).hexdigest()
    return Photo(name, uri, name, None, captions, sha256, image.width, image.height)


@cache
def _sandbox() -> Sandbox:
    return Sandbox()


def _captions(folder: Path, files: list[Path]) -> dict[str, Captions]:
    """Captions by the picture's name: the lines of `name.txt` beside it, or of metadata.jsonl."""
    captions: dict[str, Captions] = {}
    for path in files:
        name = path.relative_to(folder).as_posix()
        if path.suffix.lower() == ".txt":
            lines = [" ".join(line.split()) for line in _text(path, name).splitlines()]
            text = tuple(line for line in lines if line)
            beside = [p for p in files if p.suffix.lower() in SUFFIXES and p.stem == path.stem]
            names = [p.relative_to(folder).as_posix() for p in beside if p.parent == path.parent]
            captions |= dict.fromkeys(names, text)
        elif path.name == "metadata.jsonl":
            captions |= _metadata(path, name)
    return captions


def _metadata(path: Path, name: str) -> dict[str, Captions]:
    parent = "" if path.name == name else name.removesuffix(path.name)
    captions: dict[str, Captions] = {}
    for number, line in enumerate(_text(path, name).split("\n"), 1):
        try:
            row: dict[str, Any] = json.loads(line)
            text = row.get("text", row.get("caption", row.get("prompt")))
            if text is not None:
                if not str(text).strip():
                    raise ValueError("empty")
                captions[parent + str(row["file_name"])] = (str(text),)
        except (ValueError, KeyError, AttributeError):
            raise BadInput(f"{name}, line {number}: not JSON with file_name and text") from None
    return captions


def _text(path: Path, name: str) -> str:
    try:
        text = path.read_text("utf-8-sig").rstrip()
    except UnicodeDecodeError:
        raise BadInput(f"{name}: not UTF-8 text; save it as UTF-8") from None
    if not text:
        raise BadInput(f"{name}: empty; write the picture's caption, or remove the file")
    return text


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


def check_sizes(photos: list[Photo], side: int) -> list[str]:
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
