"""One shard's contact sheet: thumbnails and captions as small scripts that a page loads.

Owns the choice of rows, the thumbnails and the scripts' names, which say what they were made of.
Knows nothing of pages, charts or other shards.
"""

import base64
import io
import json
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from PIL import Image

from rayjobs import storage
from rayjobs.dataset.formats import FORMATS
from rayjobs.dataset.records import is_conditioning
from rayjobs.images.encode import extension_of

VERSION = 1
"""Raised when the scripts change, so that those of an older report are made again."""
THUMBNAIL_SIDE = 160
LARGE_SIDE = 512
SMALL_BYTES = 4096
"""A picture no larger than a thumbnail is shown as it is, unless it has more bytes than one."""
PICTURES_PER_FILE = 192
ROWS_TOGETHER = 16
"""Where not all of a shard is shown, so many neighbours are: a prompt's pictures stay together."""
MAX_TEXT_LENGTH = 240
"""Of a prompt in the index, a reason or a value; sheets hold whole prompts once each."""
EXAMPLES = 5
BY_SUFFIX = {".parquet": "parquet", ".tar": "webdataset", "": "folder"}
NOT_SHOWN = ("image", "image_sha256", "prompt", "model", "model_sha256", "phash", "colours")
FAILURE_COLUMNS = ("record", "prompt", "seed", "status", "error")


def write_sheet(
    output_uri: str, shard: int, suffix: str, key: str, shown: int, total: int
) -> dict[str, Any]:
    """Write the scripts of one shard, with about `shown` of its `total` rows.

    Returns what the index needs to know of it. The scripts' names begin with `key`.
    """
    writer = _SheetWriter(output_uri, key, shard, suffix)
    for position, row in enumerate(rows(output_uri, shard, suffix)):
        if row["status"] != "ok":
            add_failure(writer.facts["failures"], row)
        if is_shown(position, shown, total):
            writer.add(row)
    writer.flush()
    return writer.facts


def read_failures(output_uri: str, shard: int, suffix: str) -> dict[str, Any]:
    """The same for a shard of which nothing is shown; it reads no picture."""
    failures: dict[str, Any] = {}
    for row in rows(output_uri, shard, suffix, FAILURE_COLUMNS):
        if row["status"] != "ok":
            add_failure(failures, row)
    return {"file": file_of(shard, suffix), "files": [], "failures": failures}


def file_of(shard: int, suffix: str) -> str:
    """A shard's file or folder, below the data set."""
    return f"data/{FORMATS[BY_SUFFIX[suffix]].name(shard)}"


def shard_of(file: str) -> int:
    return int(file.rsplit("-", 1)[-1].split(".")[0])


def rows(
    output_uri: str, shard: int, suffix: str, columns: Sequence[str] | None = None
) -> Iterator[dict[str, Any]]:
    """A finished shard's rows, one after the other."""
    yield from FORMATS[BY_SUFFIX[suffix]].read(storage.join(output_uri, "data"), shard, columns)


def is_shown(position: int, shown: int, total: int) -> bool:
    """Whether a row is among about `shown` of `total`: neighbours in blocks, evenly spread."""
    if shown >= total:
        return True
    blocks, chosen = -(-total // ROWS_TOGETHER), max(1, shown // ROWS_TOGETHER)
    return (position // ROWS_TOGETHER) * chosen % blocks < chosen


def add_failure(failures: dict[str, Any], row: dict[str, Any]) -> None:
    """Count a failed record under its reason: numbers and names in it make no other reason."""
    text = (row["error"] or "no reason was given").strip()[:MAX_TEXT_LENGTH]
    shape = re.sub(r"'[^']*'|\"[^\"]*\"|\S+\.(?:png|jpe?g|webp|gif|bmp|tiff)|\d+", "…", text)
    reason = failures.setdefault(shape, {"text": text, "count": 0, "examples": []})
    reason["count"] += 1
    if len(reason["examples"]) < EXAMPLES:
        example = {"record": row["record"], "prompt": row["prompt"][:MAX_TEXT_LENGTH]}
        reason["examples"].append(example | {"seed": _exact(row["seed"])})


def read_thumbnails(
    output_uri: str, shard: int, suffix: str, records: set[int]
) -> list[dict[str, Any]]:
    """Thumbnails of some of a shard's records, with their prompts and seeds."""
    thumbs: list[dict[str, Any]] = []
    for row in rows(output_uri, shard, suffix, ("image", "record", "prompt", "seed")):
        if row["record"] in records and row["image"] is not None:
            thumb = thumbnails(row["image"]["bytes"], with_large=False)[0]
            prompt = row["prompt"][:MAX_TEXT_LENGTH]
            one = {"record": row["record"], "prompt": prompt, "seed": _exact(row["seed"])}
            thumbs.append(one | {"thumb": thumb})
            if len(thumbs) == len(records):
                break
    return thumbs


class _SheetWriter:
    """Fills one script after the other with a shard's rows."""

    def __init__(self, output_uri: str, key: str, shard: int, suffix: str):
        file = file_of(shard, suffix)
        self.facts: dict[str, Any] = {"file": file, "files": [], "failures": {}}
        self._folder, self._key = storage.join(output_uri, "report"), key
        # In a folder the pictures are files, which a page can show themselves.
        self._with_large = suffix != ""
        self._begin()

    def _begin(self) -> None:
        self._rows: list[dict[str, Any]] = []
        self._prompts: dict[str, int] = {}
        self._large: list[str | None] = []
        self._num_flagged = 0
        self._failed: list[int] = []
        self._extension = ""

    def add(self, row: dict[str, Any]) -> None:
        prompt = self._prompts.setdefault(row["prompt"], len(self._prompts))
        followed = [name for name in row if is_conditioning(name) and row[name] is not None]
        plain = {
            name: _plain(value)
            for name, value in row.items()
            if name not in NOT_SHOWN and name not in followed
        }
        # By identity: 0 is a seed, and equal to False.
        shown = {k: v for k, v in plain.items() if v is not None and v is not False and v != ""}
        thumb = large = None
        controls: list[str] = []
        if row["image"] is not None:
            try:
                controls = [thumbnails(row[name]["bytes"], False)[0] for name in followed]
                thumb, large = thumbnails(row["image"]["bytes"], self._with_large)
                self._extension = self._extension or extension_of(row["image"]["bytes"])
            except (OSError, ValueError, Image.DecompressionBombError) as error:
                shown |= {
                    "status": "unreadable",
                    "error": f"the picture: {error}"[:MAX_TEXT_LENGTH],
                }
        if row["status"] != "ok":
            self._failed.append(row["record"])
        self._num_flagged += bool(row.get("blank") or row.get("warnings"))
        made = {"of": shown, "p": prompt, "thumb": thumb}
        self._rows.append(made | {"controls": controls} if controls else made)
        self._large.append(large)
        if len(self._rows) == PICTURES_PER_FILE:
            self.flush()

    def flush(self) -> None:
        if not self._rows:
            return
        name, has_large = f"{self._key}-{len(self.facts['files'])}", any(self._large)
        sheet = {"file": self.facts["file"], "prompts": list(self._prompts), "rows": self._rows}
        if has_large:
            sheet["large"] = f"{name}-large"
            write_script(self._folder, f"{name}-large", self._large)
        write_script(self._folder, name, sheet | {"extension": self._extension})
        facts = {
            "name": name,
            "shown": len(self._rows),
            "flagged": self._num_flagged,
            "failed": self._failed,
            "prompts": [text[:MAX_TEXT_LENGTH] for text in self._prompts],
        }
        self.facts["files"].append(facts)
        self._begin()


def write_script(folder: str, name: str, value: Any) -> None:
    """A script that hands `value` to the page: scripts load from disk, where fetch() may not."""
    data = f"report.take({json.dumps(name)},{as_json(value)});\n"
    storage.write_bytes(storage.join(folder, f"{name}.js"), data.encode())


def as_json(value: Any) -> str:
    """JSON in ASCII that can stand in a script and in a page: no text in it can end either."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def thumbnails(data: bytes, with_large: bool) -> tuple[str, str | None]:
    """Data URLs of a thumbnail and, of a picture that is much larger, of a large one if wanted."""
    image = Image.open(io.BytesIO(data))
    if max(image.size) <= THUMBNAIL_SIDE and len(data) <= SMALL_BYTES:
        return _data_url(data, str(image.format).lower()), None
    large = with_large and max(image.size) > 2 * THUMBNAIL_SIDE
    side = LARGE_SIDE if large else 2 * THUMBNAIL_SIDE
    image.draft("RGB", (side, side))
    whole = image.convert("RGBA" if image.has_transparency_data else "RGB")
    whole.thumbnail((side, side), Image.Resampling.BICUBIC, reducing_gap=2.0)
    large_url = _data_url(_webp(whole, 80), "webp") if large else None
    whole.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
    return _data_url(_webp(whole, 75), "webp"), large_url


def _webp(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=quality, method=2)
    return buffer.getvalue()


def _data_url(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        # A 32-bit score has seven digits; not a number is not JSON.
        return float(f"{value:.7g}") if math.isfinite(value) else str(value)
    if isinstance(value, bool) or value is None:
        return value
    return _exact(value) if isinstance(value, int) else str(value)[:MAX_TEXT_LENGTH]


def _exact(value: int | None) -> int | str | None:
    """A browser's numbers are exact up to 2**53; larger seeds are shown as text."""
    return value if value is None or abs(value) <= 1 << 53 else str(value)
