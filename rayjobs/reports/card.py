"""README.md of a data set and of an export: a card that Hugging Face `datasets` and people read.

Owns the cards' text. Knows nothing of how the data set is made.
"""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import yaml

from rayjobs import storage
from rayjobs.dataset.formats import FORMATS
from rayjobs.dataset.lock import Lock
from rayjobs.reports import figures
from rayjobs.reports.history import History

TEXT = """---
{header}---
# Generated images

{num_records:,} images, made by `rayjobs generate`.

* Load them: `datasets.load_dataset(FOLDER)`, where FOLDER is this one; pictures come as images.
* Look at them: open `index.html`.
* `status` is `ok` or `failed`; a failed record says why in `error` and has no image.
* `manifest/` holds the SHA-256 of every finished shard; `spec.lock.json` the exact job.
* Model: `{model}` (SHA-256 `{model_sha256}`). Its licence says what these images may be used for.
{speed}
## Recipe

```yaml
{recipe}```
"""
EXPORTED = """---
{header}---
# Generated images

{num_records:,} images, exported by `rayjobs export`.

* Load them: `datasets.load_dataset(FOLDER)`, where FOLDER is this one; pictures come as images.
* `manifest/` holds the SHA-256 of every shard; `export.lock.json` says what was chosen and how.
"""
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (10**6, "100K<n<1M"))


def write(
    output_uri: str, model_uri: str, lock: Lock, schema: pa.Schema, history: History | None = None
) -> None:
    """Write the card of a data set whose records have `schema`.

    It has the speed where the finished shards' `history` is given.
    """
    last = lock.segments[-1]
    output = last.job["output"]
    header: dict[str, Any] = {
        **({"license": output["license"]} if output["license"] else {}),
        **FORMATS[lock.format].card(schema, output["image_format"]),
        "size_categories": [next((s for n, s in SIZES if lock.num_records < n), "n>1M")],
        "task_categories": ["text-to-image"],
        "tags": ["synthetic"],
    }
    text = TEXT.format(
        header=yaml.safe_dump(header, sort_keys=False),
        num_records=lock.num_records,
        model=model_uri,
        model_sha256=last.model_sha256,
        speed=_speed(history) if history is not None and history.active_s else "",
        recipe=yaml.safe_dump(last.job, sort_keys=False, allow_unicode=True),
    )
    storage.write_bytes(storage.join(output_uri, "README.md"), text.encode())


def _speed(history: History) -> str:
    hours = float(history.busy_s.sum()) / 3600
    return (
        f"* Made at {figures.rate(history.rate)} images/s in {figures.duration(history.active_s)}, "
        f"{hours:,.3g} device-hours.\n"
    )


def write_exported(
    output_uri: str,
    header: Mapping[str, Any],
    splits: Mapping[str, int],
    digits: int,
    license: str | None,
) -> None:
    """Write the card of an export whose format has `header`.

    `splits` has each split's number of records. The shards' numbers have the split's in front of
    the source shard's, which has so many digits.
    """
    (config,) = header["configs"]
    if set(splits) != {"train"}:
        config = config | {
            "data_files": [
                {"split": name, "path": _files_of_split(config["data_files"], split, digits)}
                for split, name in enumerate(splits)
                if splits[name]
            ]
        }
    whole = {
        **({"license": license} if license else {}),
        **header,
        "configs": [config],
        "tags": ["synthetic"],
    }
    text = EXPORTED.format(
        header=yaml.safe_dump(whole, sort_keys=False), num_records=sum(splits.values())
    )
    storage.write_bytes(storage.join(output_uri, "README.md"), text.encode())


def _files_of_split(patterns: str | list[str], split: int, digits: int) -> list[str]:
    """The patterns of a format's files, narrowed to the shards of one split."""
    first = f"{split * 10**digits:08d}"[:-digits]
    shards = f"data/shard-{first}{'[0-9]' * digits}"
    listed = [patterns] if isinstance(patterns, str) else patterns
    return [pattern.replace("data/*", shards, 1) for pattern in listed]
