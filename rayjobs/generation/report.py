"""The data set's index.html: contact sheets by prompt and seed, in one file that opens anywhere.

Owns the page. Reads finished shards through the manifest and knows nothing of how they were made.
"""

import base64
import io
from collections.abc import Iterator
from html import escape
from string import Template
from typing import Any

import pyarrow.parquet as pq
from PIL import Image

from rayjobs import storage
from rayjobs.generation.manifest import Manifest

MOST_IMAGES = 2_000
"""The page holds its thumbnails itself; of a larger data set it shows the first ones."""
THUMBNAIL_SIDE = 160
COLUMNS = ["image", "prompt", "seed", "sampler", "steps", "guidance_scale", "status", "error"]

PAGE = Template("""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Generated images</title>
<style>
:root { color-scheme: light dark; }
body { font: 15px/1.4 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; }
h2 { font-size: .95rem; font-weight: 600; margin: 0 0 .4rem; max-width: 32rem; }
.sheets { display: flex; flex-wrap: wrap; gap: 1.6rem 2.4rem; }
.facts { opacity: .75; }
.sheet { display: flex; flex-wrap: wrap; gap: .5rem; }
figure { margin: 0; }
figure img { display: block; min-width: 64px; max-width: 160px; border-radius: 3px; }
figcaption { font-size: 11px; opacity: .7; }
.failed { width: 10rem; padding: .5rem; border: 1px solid #c33; border-radius: 3px; }
</style>
<h1>Generated images</h1>
<p class="facts">$facts</p>
<div class="sheets">
$sheets
</div>
</html>
""")


def write(output_uri: str) -> str:
    """Write index.html for what is finished of the data set at `output_uri`; return its URI."""
    entries = list(Manifest(output_uri).entries())
    total = sum(entry["rows"] for entry in entries)
    failed = sum(entry["failed"] for entry in entries)
    sheets, shown, prompt = [], 0, None
    for row in _rows(output_uri, entries):
        if shown == MOST_IMAGES:
            break
        shown += 1
        if row["prompt"] != prompt:
            sheets.append("</div></section>" if prompt is not None else "")
            prompt = row["prompt"]
            sheets.append(f'<section><h2>{escape(prompt)}</h2><div class="sheet">')
        sheets.append(_figure(row))
    sheets.append("</div></section>" if prompt is not None else "")
    facts = f"{total:,} images in {len(entries):,} shards, {failed:,} failed"
    facts += f"; the first {shown:,} are shown" if shown < total else ""
    uri = storage.join(output_uri, "index.html")
    storage.write_bytes(uri, PAGE.substitute(facts=facts, sheets="\n".join(sheets)).encode())
    return uri


def _rows(output_uri: str, entries: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for entry in entries:
        with storage.open_input(storage.join(output_uri, entry["file"])) as file:
            for batch in pq.ParquetFile(file).iter_batches(64, columns=COLUMNS):
                yield from batch.to_pylist()


def _figure(row: dict[str, Any]) -> str:
    caption = f"seed {row['seed']}"
    if row["status"] != "ok":
        reason = escape(row["error"])
        return f'<figure class="failed">{reason}<figcaption>{caption}</figcaption></figure>'
    settings = f"{row['sampler']}, {row['steps']} steps, guidance {row['guidance_scale']:g}"
    source, (width, height) = _thumbnail(row["image"]["bytes"])
    return (
        f'<figure title="{escape(settings)}"><img loading="lazy" width="{width}" height="{height}" '
        f'alt="{escape(row["prompt"])}" src="{source}"><figcaption>{caption}</figcaption></figure>'
    )


def _thumbnail(data: bytes) -> tuple[str, tuple[int, int]]:
    """A data URL of the picture, no larger than a thumbnail, and the size to show it at."""
    image = Image.open(io.BytesIO(data))
    mime = "image/png"
    if max(image.size) > THUMBNAIL_SIDE:
        image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        small = io.BytesIO()
        image.convert("RGB").save(small, "WEBP", quality=80)
        data, mime = small.getvalue(), "image/webp"
    scale = max(1, 128 // max(image.size))
    size = (image.width * scale, image.height * scale)
    return f"data:{mime};base64,{base64.b64encode(data).decode()}", size
