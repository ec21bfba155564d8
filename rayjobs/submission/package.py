"""What a submitted job brings to the cluster: this program's code, the configuration, its files.

Owns which files those are and the archive of them, whose bytes depend on theirs alone: Ray uploads
one that it has only once. Knows no cluster.
"""

import hashlib
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayjobs import storage
from rayjobs.config import BadInput
from rayjobs.reports import figures

CODE = Path(__file__).parents[1]
STARTER = "starter"
NOT_CODE = ("__pycache__", "configs")
"""Folders of the package that no job reads."""
PLACES = ("uri", "class_uri", "loss_uri", "config", "base", "image", "encoder")
PLACES += ("clip", "aesthetic", "safety", "pick", "hps", "caption")
"""Keys whose value may be a path."""
SHOWN = 3


@dataclass(frozen=True)
class Package:
    """An archive for Ray's `working_dir`."""

    path: Path
    num_files: int
    num_bytes: int

    def __str__(self) -> str:
        return f"{figures.size(self.num_bytes)} in {figures.count(self.num_files, 'file')}"


def files(config_path: str, values: dict[str, Any]) -> dict[str, Path]:
    """What a job with these values needs, by its name in the package.

    The code; the starter models where one is used; the configuration; and what it names by a path
    relative to this folder. Absolute paths are taken for those of a file system that nodes share.
    """
    names = {_in_package(path): path for path in _code(uses_starter=STARTER in _places(values))}
    for place in _places({key: value for key, value in values.items() if key != "output"}):
        for path in _carried(place):
            names[os.path.normpath(path)] = path
    return {**names, Path(config_path).name: Path(config_path)}


def pack(names: dict[str, Path], target: Path, max_bytes: int) -> Package:
    """Write the archive at `target`. Raises BadInput when it would be too large for Ray."""
    with zipfile.ZipFile(target, "w") as archive:
        for name in sorted(names):
            # Without times, owners and modes, which are no part of a job.
            entry = zipfile.ZipInfo(name)
            entry.compress_type = zipfile.ZIP_DEFLATED
            with names[name].open("rb") as source, archive.open(entry, "w") as into:
                while data := source.read(1 << 20):
                    into.write(data)
                    if target.stat().st_size >= max_bytes:
                        raise BadInput(_too_large(names, max_bytes))
    size = target.stat().st_size
    if size >= max_bytes:
        raise BadInput(_too_large(names, max_bytes))
    return Package(target, len(names), size)


def hashes(names: dict[str, Path]) -> dict[str, str]:
    """SHA-256 of files by name."""
    found = {}
    for name, path in names.items():
        with path.open("rb") as file:
            found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def is_code(name: str) -> bool:
    return name.startswith(f"{CODE.name}/")


def _code(uses_starter: bool) -> Iterator[Path]:
    for folder, folders, found in os.walk(CODE):
        is_model = Path(folder) == CODE / STARTER and not uses_starter
        left_out = (*NOT_CODE, "model", "outlines") if is_model else NOT_CODE
        folders[:] = [name for name in folders if name not in left_out]
        yield from (Path(folder, name) for name in found)


def _in_package(path: Path) -> str:
    return path.relative_to(CODE.parent).as_posix()


def _places(values: Any, key: str = "") -> set[str]:
    """All texts below these values that may be a path or URI."""
    if isinstance(values, dict):
        return set().union(*(_places(value, str(name)) for name, value in values.items()))
    if isinstance(values, (list, tuple)):
        return set().union(*(_places(value, key) for value in values))
    return {values} if isinstance(values, str) and key in PLACES else set()


def _carried(place: str) -> list[Path]:
    """The files at a path that is relative; it may be no path at all, such as a hub id."""
    if storage.is_remote(place) or os.path.isabs(place) or place.startswith(("~", "file:")):
        return []
    path = Path(os.path.normpath(place))
    if not path.exists():
        return []
    if path.parts[0] == "..":
        raise BadInput(f"{place} is outside of this folder, and cannot be sent; submit from there")
    if path.is_file():
        return [path]
    return [each for each in sorted(path.rglob("*")) if each.is_file()]


def _too_large(names: dict[str, Path], max_bytes: int) -> str:
    by_size = sorted(names, key=lambda name: -names[name].stat().st_size)
    largest = ", ".join(
        f"{name} ({figures.size(names[name].stat().st_size)})" for name in by_size[:SHOWN]
    )
    return (
        f"the package is larger than the {figures.size(max_bytes)} that Ray takes; put what is "
        f"large on s3:// or on a disk that all nodes share, and name it there: {largest}"
    )
