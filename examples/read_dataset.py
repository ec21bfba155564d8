"""Reads a data set: only shards that the manifest names are part of it.

.venv/bin/python examples/read_dataset.py [demo/dataset]
"""

import io
import sys

import pyarrow.parquet as pq
from PIL import Image

from rayjobs import storage
from rayjobs.dataset.manifest import Manifest


def main(uri: str) -> None:
    count = 0
    for entry in Manifest(uri, "parquet").entries():
        data = storage.read_bytes(storage.join(uri, entry["file"]))
        for row in pq.read_table(io.BytesIO(data)).to_pylist():
            count += 1
            if row["status"] == "ok" and count <= 3:
                picture = Image.open(io.BytesIO(row["image"]["bytes"]))
                print(f"{row['prompt']}, seed {row['seed']}: {picture.size}")
    print(f"{count} records")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "demo/dataset")
