"""What lies beside pictures: captions and masks, as people's trainers write them.

Owns which file belongs to which picture, how captions are read, and why a file is passed over.
Opens no picture. Knows no torch.
"""

import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from rayjobs.config import BadInput

Captions = tuple[str, ...]

CAPTION_SUFFIXES = (".txt", ".caption")
"""Of a caption beside its picture; where there are both, the first counts."""
TABLES = ("metadata.jsonl", "metadata.csv")
TEXTS = ("text", "caption", "prompt")
"""A table's columns with captions; the first that a row has counts."""
MASK = re.compile(r"[-_.]mask(label)?$")
"""What a mask's name, as in dog-masklabel.png, has after that of its picture."""


@dataclass(frozen=True)
class Beside:
    """What belongs to the pictures of a folder, by their names, and what belongs to none."""

    captions: dict[str, Captions] = field(default_factory=dict)
    masks: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    """Why a file, or a row of a table, is passed over, by its name."""


def find_masks(pictures: list[str]) -> dict[str, str]:
    """The picture of each picture that is a mask: dog-masklabel.png is that of dog.jpg."""
    by_stem = {_stem(name): name for name in pictures}
    masks = {}
    for name in pictures:
        owner = by_stem.get(MASK.sub("", _stem(name)))
        if owner is not None and owner != name:
            masks[name] = owner
    return masks


def read_beside(folder: Path, names: list[str], pictures: list[str]) -> Beside:
    """What the other files of `names` say of `pictures`; all are names below `folder`.

    Raises BadInput naming a caption or a table that cannot be read.
    """
    beside = Beside()
    owners: dict[str, list[str]] = {}
    for picture in pictures:
        owners.setdefault(_stem(picture), []).append(picture)
        owners.setdefault(picture, []).append(picture)
    others = [name for name in names if name not in set(pictures)]
    for suffix in CAPTION_SUFFIXES:
        for name in others:
            if PurePosixPath(name).suffix.lower() == suffix:
                _add_caption(beside, folder, name, owners.get(_stem(name), []))
    for name in others:
        if PurePosixPath(name).name in TABLES:
            _add_table(beside, folder, name, set(pictures))
        elif PurePosixPath(name).suffix.lower() not in CAPTION_SUFFIXES:
            beside.skipped[name] = "neither a picture nor a caption"
    return beside


def _add_caption(beside: Beside, folder: Path, name: str, owners: list[str]) -> None:
    free = [picture for picture in owners if picture not in beside.captions]
    if not free:
        reason = "its picture has another caption" if owners else "a caption of no picture"
        beside.skipped[name] = reason
        return
    lines = [" ".join(line.split()) for line in _text(folder / name, name).splitlines()]
    beside.captions.update(dict.fromkeys(free, tuple(line for line in lines if line)))


def _add_table(beside: Beside, folder: Path, name: str, pictures: set[str]) -> None:
    text, parent = _text(folder / name, name), PurePosixPath(name).parent
    read = _jsonl if name.endswith(".jsonl") else _csv
    captioned = set(beside.captions)
    for file_name, captions in read(text, name):
        picture = (parent / file_name).as_posix()
        if picture not in pictures:
            beside.skipped[f"{name}: {file_name}"] = "no such picture"
        elif picture in captioned:
            beside.skipped[f"{name}: {file_name}"] = "its picture has another caption"
        else:
            beside.captions[picture] = captions


def _jsonl(text: str, name: str) -> Iterator[tuple[str, Captions]]:
    for number, line in enumerate(text.split("\n"), 1):
        try:
            yield from _row(json.loads(line))
        except (ValueError, KeyError, AttributeError, TypeError):
            raise BadInput(f"{name}, line {number}: not JSON with file_name and text") from None


def _csv(text: str, name: str) -> Iterator[tuple[str, Captions]]:
    rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    columns = rows.fieldnames or []
    if "file_name" not in columns or not any(column in columns for column in TEXTS):
        raise BadInput(f"{name}: its columns are {', '.join(columns)}, not file_name and text")
    while True:
        try:
            row = next(rows)
            yield from _row({key: value or None for key, value in row.items() if key})
        except StopIteration:
            return
        except (ValueError, KeyError, TypeError, csv.Error):
            raise BadInput(f"{name}, line {rows.line_num}: no file_name and text") from None


def _row(row: dict[str, Any]) -> Iterator[tuple[str, Captions]]:
    """A picture's name and its captions, of which a list has several. None without a caption."""
    found = next((row[key] for key in TEXTS if row.get(key) is not None), None)
    if found is None:
        return
    texts = found if isinstance(found, list) and found else [found]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError("not text")
    yield str(row["file_name"]), tuple(texts)


def _stem(name: str) -> str:
    return PurePosixPath(name).with_suffix("").as_posix()


def _text(path: Path, name: str) -> str:
    try:
        text = path.read_text("utf-8-sig").rstrip()
    except UnicodeDecodeError:
        raise BadInput(f"{name}: not UTF-8 text; save it as UTF-8") from None
    if not text:
        raise BadInput(f"{name}: empty; write the picture's caption, or remove the file")
    return text
