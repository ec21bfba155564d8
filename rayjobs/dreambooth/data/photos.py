"""Training pictures: which files count, what is wrong with a bad one, and each one's caption.

A file is first decoded in a sandbox, and in this process when it has passed. Knows no torch.
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
from rayjobs.images.container import UnreadableImage
from rayjobs.images.decode import Picture, decode
from rayjobs.images.sandbox import Sandbox

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".jp2"}
FOREIGN = {".heic", ".heif", ".svg", ".raw", ".dng", ".cr2", ".nef", ".arw", ".psd", ".pdf"}
Captions = tuple[str, ...]
MOST_ENLARGED = 4.0


@dataclass(frozen=True)
class Photo:
    """One training picture: where its bytes are, its caption and its upright size in pixels."""

    name: str
    path: Path
    """A picture, or a parquet shard of records."""
    row: int | None
    captions: Captions
    """One of them is drawn whenever the picture is shown."""
    sha256: str
    width: int
    height: int

    def read(self) -> bytes:
        if self.row is None:
            return self.path.read_bytes()
        groups, starts = _groups(self.path)
        group = int(np.searchsorted(starts, self.row, side="right")) - 1
        rows = groups.read_row_group(group, columns=["image"]).column("image")
        data: bytes = rows[self.row - int(starts[group])]["bytes"].as_py()
        return data

    def open(self) -> Image.Image:
        """The picture: RGB, upright. Raises BadInput naming the file."""
        return _decode(self.read(), self.name, decode)


def find_photos(uri: str, caption: str) -> list[Photo]:
    """Every picture below `uri` (a folder, or a data set of the generation job), by name.

    Raises BadInput naming a file that is no usable picture, or when there is none.
    """
    if storage.exists(storage.join(uri, "spec.lock.json")):
        return _of_data_set(uri)
    if not storage.is_folder(uri):
        raise BadInput(f"{uri}: no such folder of pictures")
    folder = storage.fetch(uri)
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not _is_hidden(p, folder))
    captions = _captions(folder, files)
    photos = []
    for path in files:
        if path.suffix.lower() in FOREIGN:
            raise BadInput(f"{path.name}: {path.suffix} pictures cannot be read; save it as png")
        if path.suffix.lower() in SUFFIXES:
            photos.append(_photo(path, path.relative_to(folder).as_posix(), captions, caption))
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


def _photo(path: Path, name: str, captions: dict[str, Captions], caption: str) -> Photo:
    data = path.read_bytes()
    image = _decode(data, name, _sandbox().decode)
    sha256 = hashlib.sha256(data).hexdigest()
    told = captions.get(name, (caption,))
    return Photo(name, path, None, told, sha256, image.width, image.height)


@cache
def _sandbox() -> Sandbox:
    return Sandbox()


def _captions(folder: Path, files: list[Path]) -> dict[str, Captions]:
    """Captions by the picture's name: the lines of `name.txt` beside it, or of metadata.jsonl."""
    found: dict[str, Captions] = {}
    for path in files:
        name = path.relative_to(folder).as_posix()
        if path.suffix.lower() == ".txt":
            lines = [" ".join(line.split()) for line in _text(path, name).splitlines()]
            text = tuple(line for line in lines if line)
            beside = [p for p in files if p.suffix.lower() in SUFFIXES and p.stem == path.stem]
            names = [p.relative_to(folder).as_posix() for p in beside if p.parent == path.parent]
            found |= dict.fromkeys(names, text)
        elif path.name == "metadata.jsonl":
            found |= _metadata(path, name)
    return found


def _metadata(path: Path, name: str) -> dict[str, Captions]:
    parent = "" if path.name == name else name.removesuffix(path.name)
    found: dict[str, Captions] = {}
    for number, line in enumerate(_text(path, name).split("\n"), 1):
        try:
            row: dict[str, Any] = json.loads(line)
            text = row.get("text", row.get("caption", row.get("prompt")))
            if text is not None:
                if not str(text).strip():
                    raise ValueError("empty")
                found[parent + str(row["file_name"])] = (str(text),)
        except (ValueError, KeyError, AttributeError):
            raise BadInput(f"{name}, line {number}: not JSON with file_name and text") from None
    return found


def _text(path: Path, name: str) -> str:
    try:
        text = path.read_text("utf-8-sig").rstrip()
    except UnicodeDecodeError:
        raise BadInput(f"{name}: not UTF-8 text; save it as UTF-8") from None
    if not text:
        raise BadInput(f"{name}: empty; write the picture's caption, or remove the file")
    return text


def _of_data_set(uri: str) -> list[Photo]:
    """The good records of a data set, in the records' order."""
    folder = storage.fetch(storage.join(uri, "data"))
    shards = sorted(folder.glob("*.parquet"))
    if not shards:
        raise BadInput(
            f"{uri}: no parquet shards; give a data set in parquet, or `rayjobs export` it"
        )
    columns = ["record", "prompt", "status", "image_sha256", "width", "height"]
    photos = []
    for path in shards:
        for number, row in enumerate(pq.read_table(path, columns=columns).to_pylist()):
            if row["status"] == "ok":
                name = f"{path.name}, record {row['record']}"
                size = (row["width"], row["height"])
                photos.append(
                    Photo(name, path, number, (row["prompt"],), row["image_sha256"], *size)
                )
    return photos


@lru_cache(maxsize=64)
def _groups(path: Path) -> tuple[pq.ParquetFile, np.ndarray]:
    file = pq.ParquetFile(path)
    counts = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    return file, np.cumsum([0, *counts[:-1]])


def check_sizes(photos: list[Photo], side: int) -> list[str]:
    """Warnings for pictures to be enlarged; raises BadInput for one that is far too small."""
    warnings = []
    for photo in photos:
        factor = side / (photo.width * photo.height) ** 0.5
        size = f"{photo.name}: {photo.width} x {photo.height} pixels"
        if factor > MOST_ENLARGED:
            raise BadInput(f"{size} are far too few to train at {side}; give a larger picture")
        if factor > 1:
            warnings.append(f"{size}; enlarged by {factor:.2g} for training at {side}")
    return warnings
