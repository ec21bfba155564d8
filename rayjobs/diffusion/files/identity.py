"""The bytes that a model is known by: which of its files count, and their SHA-256.

Knows files alone, not what a model takes from elsewhere.
"""

import hashlib
from pathlib import Path

from rayjobs.diffusion.files.folder import read_json
from rayjobs.diffusion.files.single import Single

COUNTED = {".json", ".txt", ".safetensors", ".model"}


def identity_files(path: Path, single: Single | None) -> list[tuple[str, Path]]:
    """Every weight and configuration of a model, by the names that do not move with its folder."""
    if path.is_file():
        return [(path.name, path)]
    if single is not None:
        return [(file.name, file) for file in (single.header.path, path / "config.json")]
    index = read_json(path / "model_index.json")
    parts = [name for name, kind in index.items() if isinstance(kind, list) and kind[0]]
    files = [file for part in parts for file in (path / part).rglob("*")]
    files = [file for file in files if file.is_file() and file.suffix in COUNTED]
    files.append(path / "model_index.json")
    return [(file.relative_to(path).as_posix(), file) for file in files]


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
