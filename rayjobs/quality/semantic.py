"""Semantic near-duplicates: groups of pictures whose embeddings point the same way.

Owns the search over the embeddings that a data set stores. It computes with whole numbers only, in
floats that hold them exactly, so that every machine finds the same groups.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from rayjobs import storage
from rayjobs.config import BadInput
from rayjobs.quality import table
from rayjobs.quality.grouping import join, root
from rayjobs.quality.kinds import ALIKE

FILE = "semantic.parquet"
TABLE = table.schema(pa.field("cosine", pa.float32()))
MAX_PICTURES = 2_000_000
"""Their vectors are kept in memory: 3 GB of 768 values each."""
SCALE = 4000
"""Of a vector's whole numbers: the square of its length, and so every sum of products on the way,
stays below 2^24."""
BLOCK = 128
"""Pictures that are compared with one another and with so many that follow them in an order."""
ORDERS = 24
"""Pictures are sorted so often, each time by other planes."""
PLANES = 64
ALL_PAIRS = 2 * BLOCK * ORDERS
"""Up to so many pictures comparing all pairs costs no more than that."""
ROWS = 4096


def pack(embeddings: list[Any]) -> np.ndarray:
    """Embeddings of length 1 as whole numbers (N, D)."""
    if not embeddings:
        return np.empty((0, 0), np.int16)
    values = np.nan_to_num(np.array(embeddings, np.float64))
    return np.rint(values * SCALE).astype(np.int16)


def groups(vectors: np.ndarray, cosine: float = ALIKE) -> np.ndarray:
    """For each picture the index of its group's first: its own, where nothing is like it.

    A group is what is connected by pairs of that cosine or more. Up to ALL_PAIRS pictures every
    pair is compared. Of more, those that lie near each other in one of ORDERS orders are, so that
    time and memory grow with their number; a pair may be missed, seldom with its group.
    """
    parent = np.arange(len(vectors))
    lengths = _lengths(vectors)
    for some, others in _compared(vectors):
        products = vectors[some].astype(np.float32) @ vectors[others].astype(np.float32).T
        near = products >= cosine * np.outer(lengths[some], lengths[others])
        near &= root(parent, some)[:, None] != root(parent, others)
        a, b = np.nonzero(near)
        join(parent, some[a], others[b])
    return root(parent, np.arange(len(vectors)))


def write(uri: str, cosine: float | None = None) -> dict[str, int] | None:
    """Write `semantic.parquet` beside the shards of a data set that has embeddings.

    Returns its counts, or None where there are none. `cosine` is the job's own where not given.
    Raises BadInput where there are more than MAX_PICTURES.
    """
    lock, manifest = table.open_data_set(uri)
    quality = lock.segments[-1].job.get("quality", {})
    if not quality.get("embedding"):
        return None
    number = sum(entry["rows"] for entry in manifest.entries())
    if number > MAX_PICTURES:
        raise BadInput(
            f"{uri} has {number:,} records, more than the {MAX_PICTURES:,} whose embeddings are "
            "compared; make parts of it in several output.uri, or group its column embedding by an "
            "index of vectors, of a database that has one"
        )
    shards = table.read_shards(
        manifest, "embedding", ["embedding"], lambda rows: pack([row["embedding"] for row in rows])
    )
    some = [shard.values for shard in shards if len(shard.values)]
    vectors = np.concatenate(some) if some else pack([])
    first = groups(vectors, quality.get("alike", ALIKE) if cosine is None else cosine)
    lengths = _lengths(vectors)

    def likeness(pictures: np.ndarray, firsts: np.ndarray) -> np.ndarray:
        products = np.einsum("nd,nd->n", vectors[pictures], vectors[firsts], dtype=np.int64)
        return (products / (lengths[pictures] * lengths[firsts])).astype(np.float32)

    return table.write(manifest, storage.join(uri, FILE), TABLE, shards, first, likeness)


def _lengths(vectors: np.ndarray) -> np.ndarray:
    """Of each vector; infinite of one that is nothing, which is like no other."""
    squares = np.einsum("nd,nd->n", vectors, vectors, dtype=np.int64)
    return np.where(squares > 0, np.sqrt(squares.astype(np.float64)), np.inf)


def _compared(vectors: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Which pictures to compare with which, as two arrays of indices at a time."""
    number = len(vectors)
    starts = range(0, number, BLOCK)
    if number <= ALL_PAIRS:
        every = np.arange(number)
        yield from ((every[start : start + BLOCK], every[start:]) for start in starts)
        return
    for order in _orders(vectors):
        for start in starts:
            yield order[start : start + BLOCK], order[start : start + 2 * BLOCK]


def _orders(vectors: np.ndarray) -> Iterator[np.ndarray]:
    """Pictures sorted by the side on which they lie of random planes through their middle.

    Those that point the same way are often on the same side of the first planes, which decide.
    """
    bits = np.random.PCG64(17)  # whose numbers are the same in every version of numpy
    number, width = vectors.shape
    middle = (vectors.sum(axis=0, dtype=np.int64) // number).astype(np.float32)
    for _ in range(ORDERS):
        words = bits.random_raw(width * PLANES // 64).astype("<u8")
        signs = np.unpackbits(words.view(np.uint8)).reshape(width, PLANES)
        planes = signs.astype(np.float32) * 2 - 1
        keys = np.empty(number, np.uint64)
        for start in range(0, number, ROWS):
            sides = (vectors[start : start + ROWS].astype(np.float32) - middle) @ planes > 0
            keys[start : start + ROWS] = np.packbits(sides, axis=1).view(">u8").ravel()
        yield np.argsort(keys, kind="stable")
