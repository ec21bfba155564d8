"""Semantic near-duplicates against comparing all pairs, and their table beside a data set."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from rayjobs.config import BadInput
from rayjobs.dataset.formats import FORMATS
from rayjobs.dataset.lock import Lock, Segment, create_lock
from rayjobs.dataset.manifest import Manifest
from rayjobs.dataset.records import schema
from rayjobs.quality import semantic, table
from rayjobs.quality.semantic import groups, pack


def embeddings(number: int, width: int = 64, share: float = 0.1, seed: int = 0) -> np.ndarray:
    """Of length 1 and, as those of pictures, more on one side; some lie near an earlier one."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(number, width)) + 0.8
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    for n in np.flatnonzero(rng.random(number) < share):
        near = values[rng.integers(n)] if n else values[0]
        moved = near + rng.normal(size=width) * rng.uniform(0, 0.5) / np.sqrt(width)
        values[n] = moved / np.linalg.norm(moved)
    return values.astype(np.float32)


def every_pair(values: np.ndarray, cosine: float) -> list[int]:
    """The first of each one's group, by every pair and by spreading the lowest index."""
    near = values.astype(np.float64) @ values.T.astype(np.float64) >= cosine
    np.fill_diagonal(near, True)
    first = np.arange(len(values))
    while True:
        lowest = np.where(near, first, len(first)).min(axis=1)
        if (lowest == first).all():
            return first.tolist()
        first = lowest


@pytest.mark.parametrize("number", [1, 2, 700])
def test_of_few_all_pairs_are_compared(number: int) -> None:
    values = embeddings(number)
    found = groups(pack(values.tolist()), 0.95)
    assert found.tolist() == every_pair(values, 0.95)
    assert number < 700 or len(set(found.tolist())) < number - 30


def test_of_many_hardly_a_pair_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = pack(embeddings(12_000, width=32).tolist())
    found = groups(vectors)
    monkeypatch.setattr(semantic, "ALL_PAIRS", len(vectors))
    expected = groups(vectors)
    assert (expected != np.arange(len(vectors))).sum() > 800
    assert (found != expected).sum() <= 8
    assert (expected[found] == expected).all()  # and none is in another's group


def test_the_order_in_which_a_processor_adds_changes_nothing() -> None:
    """The sums are whole numbers below 2^24, which float32 holds exactly, also for long vectors."""
    vectors = pack(embeddings(64, width=1280).tolist())
    floats, order = vectors.astype(np.float32), np.random.default_rng(1).permutation(1280)
    exact = vectors.astype(np.int64) @ vectors.astype(np.int64).T
    assert exact.max() < 2**24
    assert (floats @ floats.T == exact).all()
    assert (floats[:, order] @ floats[:, order].T == exact).all()


def test_copies_are_one_group_and_what_is_nothing_is_alone() -> None:
    one = embeddings(1).repeat(7000, axis=0)
    one[5] = 0
    one[9] = np.nan
    found = groups(pack(one.tolist()))
    assert set(found.tolist()) == {0, 5, 9}
    assert groups(pack([])).tolist() == []


def data_set(uri: str, values: list[Any], form: str = "parquet", **quality: Any) -> None:
    """A data set of two records a shard, with these embeddings; None is a failure."""
    manifest, columns = Manifest(uri, form), schema(scores=["embedding"])
    for shard in range((len(values) + 1) // 2):
        rows = [
            {"record": 2 * shard + n, "image_id": f"id-{2 * shard + n}", "prompt": "p"}
            | ({"image": None, "status": "failed"} if each is None else {"status": "ok"})
            | {"image": each if each is None else {"bytes": b"\x89PNG\r\n\x1a\n", "path": None}}
            | {"embedding": each}
            for n, each in enumerate(values[2 * shard : 2 * shard + 2])
        ]
        facts = {"rows": len(rows), "failed": 0, "seconds": 1.0}
        manifest.commit(shard, FORMATS[form].encode(shard, rows, columns), facts)
    segment = Segment(
        job={"output": {"format": form}, "quality": {"embedding": True, **quality}},
        prompts_sha256="",
        num_prompts=1,
        model_name="starter",
        model_sha256="",
        guided=True,
        num_records=len(values),
        num_shards=(len(values) + 1) // 2,
    )
    create_lock(Lock(segments=(segment,), determinism={}), uri)


@pytest.mark.parametrize("form", ["parquet", "webdataset", "folder"])
def test_the_table_of_a_data_set(tmp_path: Path, form: str) -> None:
    uri, near = str(tmp_path / form), [0.97, (1 - 0.97**2) ** 0.5, 0.0]
    values = [[1.0, 0, 0], [0, 0, 1.0], None, near, [0, 0, 1.0]]
    data_set(uri, values, form)
    assert semantic.write(uri) == {"pictures": 4, "groups": 2, "members": 4, "largest": 2}
    rows = pq.read_table(tmp_path / form / semantic.FILE, schema=semantic.TABLE).to_pylist()
    assert [(row["group"], row["record"], row["image_id"]) for row in rows] == [
        *((0, 0, "id-0"), (0, 3, "id-3"), (1, 1, "id-1"), (1, 4, "id-4"))
    ]
    assert [row["cosine"] for row in rows] == pytest.approx([1, 0.97, 1, 1], abs=1e-3)
    assert table.repeated(uri, semantic.FILE).tolist() == [3, 4]
    assert semantic.write(uri, 0.98) == {"pictures": 4, "groups": 1, "members": 2, "largest": 2}


def test_a_job_says_how_much_is_alike_and_too_many_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = str(tmp_path / "set")
    data_set(uri, [[1.0, 0], [0.8, 0.6]], alike=0.75)
    assert semantic.write(uri)["groups"] == 1
    data_set(other := str(tmp_path / "other"), [[1.0, 0], [0.8, 0.6]], embedding=False)
    assert semantic.write(other) is None
    monkeypatch.setattr(semantic, "MAX_PICTURES", 1)
    with pytest.raises(BadInput, match="2 records, more than the 1 whose embeddings"):
        semantic.write(uri)
