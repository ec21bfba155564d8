"""The data set's README.md: a card that Hugging Face `datasets` and people can read.

Owns the card's words. Knows nothing of how the data set is made.
"""

from typing import Any

import pyarrow as pa
import yaml

from rayjobs import storage
from rayjobs.dataset.formats import FORMATS
from rayjobs.dataset.lock import Lock

TEXT = """---
{header}---
# Generated images

{num_records:,} images, made by `rayjobs generate`.

* Load them: `datasets.load_dataset(FOLDER)`, where FOLDER is this one; pictures come as images.
* Look at them: open `index.html`.
* `status` is `ok` or `failed`; a failed record says why in `error` and has no image.
* `manifest/` holds the SHA-256 of every finished shard; `spec.lock.json` the exact job.
* Model: `{model}` (SHA-256 `{model_sha256}`). Its licence says what these images may be used for.

## Recipe

```yaml
{recipe}```
"""
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (10**6, "100K<n<1M"))


def write(output_uri: str, model_uri: str, lock: Lock, schema: pa.Schema) -> None:
    """Write the card of a data set whose records have `schema`."""
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
        recipe=yaml.safe_dump(last.job, sort_keys=False, allow_unicode=True),
    )
    storage.write_bytes(storage.join(output_uri, "README.md"), text.encode())
