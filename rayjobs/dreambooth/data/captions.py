"""What lies beside pictures: captions and masks, as people's trainers write them.

Owns which file belongs to which picture, how captions are read, and why a file is passed over.
Opens no picture. Knows no torch.
"""

import csv
import io
import json
import re
import unicodedata
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
MASK_FOLDERS = ("mask", "masks")
"""Or it has its picture's name, in a folder of this name beside it."""
REPEATS = re.compile(r"\d+_.+")
"""kohya's name of a folder: repeats and words."""


@dataclass(frozen=True)
class Beside:
    """What belongs to the pictures of a folder, by their names, and what belongs to none."""

    captions: dict[str, Captions] = field(default_factory=dict)
    masks: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    """Why a file, or a row of a table, is passed over, by its name."""


def find_masks(pictures: list[str]) -> dict[str, list[str]]:
    """The pictures of each picture that is a mask: dog-masklabel.png is that of dog.jpg."""
    by_stem: dict[str, list[str]] = {}
    for name in pictures:
        by_stem.setdefault(_stem(name), []).append(name)
    masks = {}
    for name in pictures:
        stem, folder = PurePosixPath(_stem(name)), PurePosixPath(name).parent
        beside = str(folder.parent / stem.name) if folder.name in MASK_FOLDERS else str(stem)
        owner = MASK.sub("", beside)
        if owner != str(stem) and owner in by_stem:
            masks[name] = by_stem[owner]
    return masks


def folders_with_repeats(pictures: list[str]) -> dict[str, str]:
    """Why the names of such folders say nothing here."""
    names = {part for name in pictures for part in PurePosixPath(name).parts[:-1]}
    reason = "repeats and words in a folder's name are not read; use repeats and prompt"
    return {f"{name}/": reason for name in sorted(names) if REPEATS.fullmatch(name)}


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
    lines = [" ".join(line.split()) for line in _text(folder / name, name).split("\n")]
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
        elif not captions:
            beside.skipped[f"{name}: {file_name}"] = f"a row without {', '.join(TEXTS)}"
        else:
            beside.captions[picture] = beside.captions.get(picture, ()) + captions


def _jsonl(text: str, name: str) -> Iterator[tuple[str, Captions]]:
    for number, line in enumerate(text.split("\n"), 1):
        try:
            if line.strip():
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
            found = [] if None in row else list(_row({key: row[key] or None for key in row}))
        except StopIteration:
            return
        except (ValueError, KeyError, TypeError, csv.Error):
            raise BadInput(f"{name}, line {rows.line_num}: no file_name and text") from None
        if None in row:
            raise BadInput(
                f"{name}, line {rows.line_num}: more cells than columns; put a caption with commas "
                "in quotes"
            )
        yield from found


def _row(row: dict[str, Any]) -> Iterator[tuple[str, Captions]]:
    """A picture's name and its captions: of a list several, of a row of other columns none.

    Nothing where the caption is null.
    """
    columns = [key for key in TEXTS if key in row]
    found = next((row[key] for key in columns if row[key] is not None), None)
    if found is None and columns:
        return
    texts = found if isinstance(found, list) and found else [] if found is None else [found]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError("not text")
    yield str(row["file_name"]), tuple(texts)


def _stem(name: str) -> str:
    """A name without suffix, an accent written in one way: macOS writes another than the rest."""
    return unicodedata.normalize("NFC", PurePosixPath(name).with_suffix("").as_posix())


def _text(path: Path, name: str) -> str:
    try:
        text = path.read_text("utf-8-sig").rstrip()
        if "\0" in text:  # UTF-16 without its mark
            raise ValueError("no text")
    except ValueError:
        raise BadInput(f"{name}: not UTF-8 text; save it as UTF-8") from None
    if not text:
        raise BadInput(f"{name}: empty; write the picture's caption, or remove the file")
    return text
