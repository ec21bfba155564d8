"""Groups of near-duplicates against comparing all pairs, and the table beside a data set."""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rayjobs import storage
from rayjobs.config import BadInput
from rayjobs.dataset.formats import FORMATS
from rayjobs.dataset.lock import Lock, Segment, create_lock
from rayjobs.dataset.manifest import Manifest
from rayjobs.dataset.records import schema
from rayjobs.images.encode import encode_picture
from rayjobs.quality import duplicates
from rayjobs.quality.duplicates import Signatures, diversity, groups, pack
from rayjobs.quality.pixels import Signature, measure

Make = Callable[[int], Image.Image]


def random_signatures(number: int, seed: int = 0) -> Signatures:
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**64, number, np.uint64)
    return Signatures(hashes, rng.integers(0, 256, (number, 27), np.uint8))


def flipped(value: np.uint64, bits: np.ndarray) -> np.uint64:
    return value ^ np.uint64(sum(1 << int(bit) for bit in bits))


def crowded(number: int, bits: int, levels: int, seed: int) -> Signatures:
    """Signatures many of which are near others, on both sides of the bounds."""
    rng = np.random.default_rng(seed)
    made = random_signatures(number, seed)
    for n in range(number // 4, number):
        near = int(rng.integers(n))
        flips = rng.choice(64, int(rng.integers(2 * bits + 2)), replace=False)
        made.hashes[n] = flipped(made.hashes[near], flips)
        shift = rng.integers(-levels, levels + 1, 27) * int(rng.integers(1, 3))
        made.colours[n] = np.clip(made.colours[near] + shift, 0, 255)
    return made


def brute_force(signatures: Signatures, bits: int, levels: int) -> list[int]:
    """The first of each one's group, by every pair and by spreading the lowest index."""
    colours = signatures.colours.astype(int)
    near = np.bitwise_count(signatures.hashes[:, None] ^ signatures.hashes) <= bits
    near &= np.abs(colours[:, None] - colours).max(axis=2) <= levels
    first = np.arange(len(signatures))
    while True:
        lowest = np.where(near, first, len(first)).min(axis=1)
        if (lowest == first).all():
            return first.tolist()
        first = lowest


@pytest.mark.parametrize("bits", [0, 1, 4, 8])
@pytest.mark.parametrize("levels", [0, 12])
def test_groups_are_those_of_all_pairs(bits: int, levels: int) -> None:
    for seed in range(3):
        signatures = crowded(300, bits, levels, seed)
        expected = brute_force(signatures, bits, levels)
        assert groups(signatures, bits, levels).tolist() == expected
        assert len(set(expected)) < 300


@pytest.mark.parametrize("number", [10, 10**5, 10**6, 10**8])
@pytest.mark.parametrize("bits", [0, 2, 4, 6])
def test_masks_leave_out_no_pair(number: int, bits: int) -> None:
    masks = duplicates._masks(number, bits)
    rng = np.random.default_rng(0)
    for _ in range(200):
        difference = flipped(np.uint64(0), rng.choice(64, bits, replace=False))
        assert any(difference & mask == 0 for mask in masks)


def test_near_ones_are_found_among_many() -> None:
    signatures = random_signatures(50_000)
    rng = np.random.default_rng(1)
    for n in range(200):
        signatures.hashes[-1 - n] = flipped(signatures.hashes[n], rng.choice(64, 4, replace=False))
        signatures.colours[-1 - n] = signatures.colours[n] ^ 7
    first = groups(signatures)
    assert first[::-1][:200].tolist() == list(range(200))
    assert len(np.unique(first)) == 50_000 - 200


def test_many_copies_are_one_group_soon() -> None:
    copies = pack([Signature("0123456789abcdef", "80" * 27)] * 100_000)
    assert not groups(copies).any()


def test_many_that_are_nearly_the_same_are_one_group_soon() -> None:
    rng = np.random.default_rng(2)
    number = 10_000
    flips = np.uint64(1) << rng.integers(0, 64, (2, number)).astype(np.uint64)
    colours = rng.integers(97, 104, (number, 27)).astype(np.uint8)
    assert not groups(Signatures(np.uint64(77) ^ flips[0] ^ flips[1], colours)).any()


def test_one_hash_in_many_colours_is_a_group_for_each() -> None:
    rng = np.random.default_rng(3)
    base = rng.integers(0, 4, (40, 27)) * 64 + 32
    which = rng.integers(0, 40, 4000)
    colours = (base[which] + rng.integers(-3, 4, (4000, 27))).astype(np.uint8)
    first = groups(Signatures(np.full(4000, 5, np.uint64), colours))
    assert (which[first] == which).all()
    assert len(np.unique(first)) == 40


def test_of_none_and_of_one() -> None:
    assert groups(pack([])).tolist() == []
    assert groups(pack([Signature("0" * 16, "00" * 27)])).tolist() == [0]


def test_diversity_is_low_where_pictures_come_twice() -> None:
    apart = random_signatures(60)
    twice = Signatures(np.tile(apart.hashes, 2), np.tile(apart.colours, (2, 1)))
    half = Signatures(np.append(apart.hashes, apart.hashes[:30]), twice.colours[:90])
    assert diversity(apart) > 0.9
    assert diversity(twice) == 0
    assert diversity(half) == pytest.approx(diversity(apart) / 3, abs=0.05)
    assert diversity(random_signatures(1)) == 1


def test_diversity_is_the_mean_of_the_nearest() -> None:
    grey, dark = "80" * 27, "70" * 27
    made = [Signature("0" * 16, grey), Signature("0" * 15 + "f", grey), Signature("f" * 16, dark)]
    # The first two differ in 4 of 16 bits; the third in more than that from both.
    assert diversity(pack(made)) == pytest.approx((0.25 + 0.25 + 1) / 3)


@pytest.fixture
def data_set(picture: Make) -> Callable[[str, str, list[list[int | None]]], None]:
    """Writes a data set whose shards show the pictures of these numbers; None is a failure."""

    def row(record: int, number: int | None) -> dict[str, Any]:
        made = {"record": record, "image_id": f"id-{record}", "prompt": "p"}
        made |= {"image": None, "status": "failed"}
        if number is None:
            return made
        image = picture(number)
        data = {"bytes": encode_picture(image, "png", 90), "path": None}
        return made | measure(image) | {"image": data, "status": "ok"}

    def write(uri: str, name: str, shards: list[list[int | None]]) -> None:
        manifest, record = Manifest(uri, name), 0
        for shard, numbers in enumerate(shards):
            rows = [row(record + n, number) for n, number in enumerate(numbers)]
            record += len(rows)
            facts = {"rows": len(rows), "failed": numbers.count(None), "seconds": 1.0}
            manifest.commit(shard, FORMATS[name].encode(shard, rows, schema()), facts)
        segment = Segment(
            job={"output": {"format": name}},
            prompts_sha256="",
            num_prompts=1,
            model_name="starter",
            model_sha256="",
            guided=True,
            num_records=record,
            num_shards=len(shards),
        )
        create_lock(Lock(segments=(segment,), determinism={}), uri)

    return write


def rows_of(uri: str) -> list[dict[str, Any]]:
    data = storage.read_bytes(storage.join(uri, "duplicates.parquet"))
    table: pa.Table = pq.read_table(io.BytesIO(data))
    assert table.schema.equals(duplicates.TABLE)
    return table.to_pylist()


@pytest.mark.parametrize("name", ["parquet", "webdataset", "folder"])
def test_the_table_of_a_data_set(name: str, tmp_path: Any, data_set: Callable[..., None]) -> None:
    uri = str(tmp_path / "set")
    data_set(uri, name, [[1, None, 2], [3, 2, 4], [5], [None, 2, 1]])
    counts = duplicates.write(uri)
    assert counts == {"pictures": 8, "groups": 2, "members": 5, "largest": 3}
    rows = rows_of(uri)
    assert [(row["group"], row["record"]) for row in rows] == [
        (0, 0),
        (0, 9),
        (1, 2),
        (1, 4),
        (1, 8),
    ]
    for row in rows:
        shard = {0: 0, 2: 0, 4: 1, 8: 3, 9: 3}[row["record"]]
        assert row["file"] == f"data/{FORMATS[name].name(shard)}"
        assert row["image_id"] == f"id-{row['record']}"
        assert row["distance"] == 0


def test_a_data_set_without_duplicates_and_one_on_s3(
    tmp_path: Any, bucket: str, data_set: Callable[..., None]
) -> None:
    local, remote = str(tmp_path / "set"), f"{bucket}/set"
    data_set(local, "parquet", [[1, 2]])
    assert duplicates.write(local)["groups"] == 0
    assert rows_of(local) == []
    data_set(remote, "parquet", [[1, 2], [2]])
    assert duplicates.write(remote)["groups"] == 1
    assert [row["record"] for row in rows_of(remote)] == [1, 2]
    data_set(str(tmp_path / "failed"), "parquet", [[None, None]])
    assert duplicates.write(str(tmp_path / "failed"))["pictures"] == 0


def test_no_data_set_is_said(tmp_path: Any) -> None:
    with pytest.raises(BadInput, match="no data set is there"):
        duplicates.write(str(tmp_path / "nothing"))
