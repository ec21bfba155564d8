"""Near-duplicates within a data set: groups of pictures that look alike, and how diverse a set is.

Owns the search, which never compares all pairs. What "alike" means is decided by `pixels`, and the
table of what is found is `table`'s.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from rayjobs import storage
from rayjobs.quality import table
from rayjobs.quality.grouping import join, root
from rayjobs.quality.pixels import ALIKE_BITS, ALIKE_LEVELS, HASH_BITS, Signature

FILE = "duplicates.parquet"
WINDOW = 256
"""Of pictures that share a key, each is compared with so many that follow: 100,000 pictures that
are all nearly the same cost no more than that, and still end in one group."""
CHUNK = 1 << 18
"""Pairs looked at together: small enough for a processor's cache."""
SORTING = 6
"""What sorting costs for each picture, in comparisons of two pictures."""
MIXER = np.uint64(0x9E3779B97F4A7C15)
"""Odd, and with its bits well spread."""
FAR_BITS = 16
FAR_LEVELS = 64
"""From here on two pictures have nothing to do with each other, for `diversity`."""
MAX_COMPARED = 2048
NO_HASHES = np.empty(0, np.uint64)
NO_COLOURS = np.empty((0, 27), np.uint8)

TABLE = table.schema(pa.field("distance", pa.int32()))


@dataclass(frozen=True)
class Signatures:
    """Many signatures as arrays, 35 bytes each: hashes (N,) uint64 and colours (N, 27) uint8."""

    hashes: np.ndarray
    colours: np.ndarray

    def __len__(self) -> int:
        return len(self.hashes)


def pack(signatures: Iterable[Signature]) -> Signatures:
    """Arrays of what is iterated over, read once."""
    data = bytearray()
    for signature in signatures:
        data += bytes.fromhex(signature.phash) + bytes.fromhex(signature.colours)
    rows = np.frombuffer(data, np.uint8).reshape(-1, 8 + 27)
    hashes = np.ascontiguousarray(rows[:, :8]).view(">u8").ravel().astype(np.uint64)
    return Signatures(hashes, np.ascontiguousarray(rows[:, 8:]))


def groups(
    signatures: Signatures, bits: int = ALIKE_BITS, levels: int = ALIKE_LEVELS
) -> np.ndarray:
    """For each picture the index of its group's first: its own, where nothing is like it.

    A group is what is connected by pairs that look alike, so its ends may differ by more. Pairs are
    found by sorting on parts of the hash: two hashes that differ in at most `bits` bits agree in
    some choice of whole bands. Every such pair is found unless more than WINDOW pictures share the
    bands; there a pair may be missed, seldom with its group, since neighbours are joined too.
    """
    order, is_new = _sorted(signatures)
    distinct = order[is_new]
    hashes, colours = signatures.hashes[distinct], signatures.colours[distinct]
    parent = np.arange(len(distinct))
    for mask in _masks(len(distinct), bits):
        for a, b in _candidates(hashes, mask):
            near = np.bitwise_count(hashes[a] ^ hashes[b]) <= bits
            near &= parent[a] != parent[b]
            a, b = a[near], b[near]
            alike = _colour_difference(colours[a], colours[b]) <= levels
            join(parent, a[alike], b[alike])
    return _firsts(order, root(parent, np.cumsum(is_new) - 1))


def write(uri: str) -> dict[str, int]:
    """Write `duplicates.parquet` beside the shards of the data set at `uri`; return its counts.

    It has a row for each member of a group of two or more: the group's number, record, image_id,
    file, and the bits in which its hash differs from that of the group's first. Shards are read
    twice at most, and never their pictures.
    """
    _, manifest = table.open_data_set(uri)
    shards = table.read_shards(
        manifest,
        "phash",
        ["phash", "colours"],
        lambda rows: pack(Signature(row["phash"], row["colours"]) for row in rows),
    )
    hashes = np.concatenate([NO_HASHES, *(shard.values.hashes for shard in shards)])
    colours = np.concatenate([NO_COLOURS, *(shard.values.colours for shard in shards)])
    first = groups(Signatures(hashes, colours))

    def likeness(pictures: np.ndarray, firsts: np.ndarray) -> np.ndarray:
        return np.bitwise_count(hashes[pictures] ^ hashes[firsts])

    return table.write(manifest, storage.join(uri, FILE), TABLE, shards, first, likeness)


def diversity(signatures: Signatures) -> float:
    """How much the pictures of a set differ, 0..1: the mean over pictures of what sets each apart.

    That is its difference from the picture nearest to it: the share of FAR_BITS in which their
    hashes differ, or of FAR_LEVELS by which the colour of some cell does, whichever is more, and 1
    at most. A copy brings 0, so a set in which every picture is there twice has 0; the mean over
    all pairs would hardly notice. One picture alone is 1. Of more than MAX_COMPARED pictures as
    many are looked at, evenly spaced, so compare sets of about the same size.
    """
    chosen = np.linspace(0, len(signatures) - 1, min(len(signatures), MAX_COMPARED)).astype(int)
    if len(chosen) < 2:
        return 1.0
    hashes, colours = signatures.hashes[chosen], signatures.colours[chosen]
    nearest = []
    for n in range(len(chosen)):
        structure = np.bitwise_count(hashes ^ hashes[n]) / FAR_BITS
        colour = _colour_difference(colours, colours[n]) / FAR_LEVELS
        apart = np.maximum(structure, colour)
        apart[n] = 1
        nearest.append(min(1.0, float(apart.min())))
    return float(np.mean(nearest))


def _sorted(signatures: Signatures) -> tuple[np.ndarray, np.ndarray]:
    """The order by hash, then colours, and in it which pictures differ from the one before.

    Colours count roughly first, two bits of each, so that what is alike lies together, and then by
    a mix of all their bits.
    """
    rough = np.zeros(len(signatures), np.uint64)
    exact = np.zeros(len(signatures), np.uint64)
    for channel in signatures.colours.T:
        rough = rough << np.uint64(2) | (channel >> 6)
        exact = exact * MIXER + channel
    order = np.lexsort([exact, rough, signatures.hashes])
    is_new = np.ones(len(order), bool)
    is_new[1:] = False
    for key in (signatures.hashes[order], exact[order]):
        is_new[1:] |= key[1:] != key[:-1]
    return order, is_new


def _masks(number: int, bits: int) -> list[np.uint64]:
    """Which parts of the hashes to sort by, once for each mask, so that no near pair is missed.

    Of more bands than `bits`, at least the others agree. More bands mean longer keys, hence fewer
    pairs to look at, but more sortings: the cheapest number for so many hashes, were they random.
    """

    def cost(bands: int) -> float:
        pairs = number / 2 ** (HASH_BITS * (bands - bits) / bands + 1)
        return math.comb(bands, bits) * (SORTING + min(pairs, WINDOW))

    bands = min(range(bits + 1, bits + 6), key=cost)
    # A band takes every n-th bit: low frequencies, which tell most, are in all of them.
    parts = [sum(1 << bit for bit in range(band, HASH_BITS, bands)) for band in range(bands)]
    chosen = itertools.combinations(parts, bands - bits)
    return [np.uint64(sum(combination)) for combination in chosen]


def _candidates(hashes: np.ndarray, mask: np.uint64) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs that agree under `mask`, as two arrays of indices at a time."""
    order = np.argsort(hashes & mask, kind="stable")
    keys = hashes[order] & mask
    at = np.arange(len(order))
    for shift in range(1, WINDOW + 1):
        at = at[at + shift < len(order)]
        at = at[keys[at] == keys[at + shift]]
        if not len(at):
            return
        for start in range(0, len(at), CHUNK):
            part = at[start : start + CHUNK]
            yield order[part], order[part + shift]


def _colour_difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (np.maximum(a, b) - np.minimum(a, b)).max(axis=-1, initial=0)


def _firsts(order: np.ndarray, group: np.ndarray) -> np.ndarray:
    """For each picture the lowest index of its group; `group` has one for each of `order`."""
    lowest = np.full(len(order), len(order))
    np.minimum.at(lowest, group, order)
    first = np.empty(len(order), np.int64)
    first[order] = lowest[group]
    return first
