"""Shards in every format: the same bytes again, every record back, and other people's readers."""

import datetime as dt
import decimal
import gc
import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import duckdb
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
import yaml
from PIL import Image

from rayjobs import storage
from rayjobs.config import BadInput
from rayjobs.dataset.formats import FORMATS, check_schema
from rayjobs.dataset.records import IMAGE, conditioning, schema
from rayjobs.images.encode import EXTENSION, encode_picture

Row = dict[str, Any]

FAILED = (0, 3, 5, 8, 9, 10, 11)
"""First in both shards, in the middle of one, and the whole of the last."""
UTC = dt.UTC
PASSED = {
    "topic": (pa.string(), "birds"),
    "rank": (pa.uint8(), 7),
    "ratio": (pa.float32(), 0.1),
    "whole": (pa.float64(), 7.0),
    "nothing": (pa.float64(), float("-inf")),
    "when": (pa.timestamp("us", "UTC"), dt.datetime(2024, 5, 6, 7, 8, 9, 10, UTC)),
    "day": (pa.date32(), dt.date(2024, 5, 6)),
    "hour": (pa.time64("us"), dt.time(7, 8, 9, 10)),
    "span": (pa.duration("ms"), dt.timedelta(seconds=1.5)),
    "price": (pa.decimal128(8, 2), decimal.Decimal("12.50")),
    "blob": (pa.binary(), b"\x00\xff\n"),
    "tags": (pa.list_(pa.string()), ["a", None, "b\n"]),
    "box": (pa.struct([("x", pa.int32()), ("d", pa.list_(pa.date32()))]), None),
    "boxes": (
        pa.list_(pa.struct([("when", pa.date32())])),
        [{"when": dt.date(2024, 1, 2)}],
    ),
    "embedding": (pa.list_(pa.float32(), 3), [0.5, 1.0, -2.0]),
    "corners": (pa.list_(pa.list_(pa.int16(), 2)), [[0, 1], [2, 3]]),
    "half": (pa.float16(), 0.5),
    "big": (pa.uint64(), 2**63 - 1),
    "noon": (pa.date64(), dt.date(2024, 5, 6)),
    "cost": (pa.decimal32(7, 2), decimal.Decimal("-1.25")),
    "flag": (pa.bool_(), False),
    "tiny": (pa.int8(), -128),
    "short": (pa.int16(), 2**15 - 1),
    "count": (pa.int64(), -(2**63)),
    "index": (pa.uint32(), 2**32 - 1),
    "minute": (pa.time32("s"), dt.time(7, 8, 9)),
    "naive": (pa.timestamp("ms"), dt.datetime(2024, 5, 6, 7, 8, 9)),
    "essay": (pa.large_string(), "ünd\n"),
    "votes": (pa.list_(pa.bool_()), [True, None, False]),
    "sketch": (IMAGE, {"bytes": encode_picture(Image.new("RGB", (8, 8)), "png", 90), "path": "a"}),
}


@pytest.fixture
def record(picture: Callable[[int], Image.Image]) -> Callable[..., Row]:
    """Record `k` as a worker makes it; some have failed."""

    def make(k: int, image_format: str = "png") -> Row:
        failed = k in FAILED
        image = None if failed else encode_picture(picture(k), image_format, 90)
        return {
            "image": None if image is None else {"bytes": image, "path": None},
            "image_id": hashlib.sha256(str(k).encode()).hexdigest(),
            "image_sha256": None if image is None else hashlib.sha256(image).hexdigest(),
            "record": k,
            "prompt": f'number {k}, "quoted"\nünd\u2028more',
            "negative_prompt": None if k < 6 else "bad",
            "seed": 2**63 - 1 - k,
            "sampler": "euler",
            "steps": 4,
            "guidance_scale": 7.0,
            "width": 64,
            "height": 64,
            "model": "starter",
            "model_sha256": "ab" * 32,
            "blank": False,
            "sharpness": 0.1,
            "status": "failed" if failed else "ok",
            "error": "no such image" if failed else None,
        }

    return make


def write(name: str, uri: str, records: list[list[Row]], kinds: pa.Schema) -> None:
    """A data set of these shards, with everything that lies beside them."""
    for shard, rows in enumerate(records):
        for file, data in FORMATS[name].encode(shard, rows, kinds).items():
            storage.write_bytes(storage.join(uri, "data", file), data)
    for other in (
        "manifest/00000000.json",
        "manifest/compact-000.parquet",
        "prompts/segment-000.parquet",
        "spec.lock.json",
        "index.html",
        "thumbnails/0.jpg",
    ):
        storage.write_bytes(storage.join(uri, other), b"{}")


def shards(record: Callable[..., Row], image_format: str = "png") -> list[list[Row]]:
    return [[record(k, image_format) for k in range(n, n + 4)] for n in (0, 4, 8)]


def passing(rows: list[Row]) -> tuple[list[Row], pa.Schema]:
    """The rows with columns of every type, null in the odd ones."""
    values = {name: value for name, (_, value) in PASSED.items()}
    kinds = schema([pa.field(name, kind) for name, (kind, _) in PASSED.items()], ["clip"])
    return [{**row, **(values if row["record"] % 2 == 0 else {})} for row in rows], kinds


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_records_are_the_same_bytes(name: str, record: Callable[..., Row]) -> None:
    rows, kinds = passing([record(k) for k in range(8)])
    again = [dict(reversed(row.items())) for row in rows]
    first = FORMATS[name].encode(3, rows, kinds)
    assert first == FORMATS[name].encode(3, again, kinds)
    assert list(first) == list(FORMATS[name].encode(3, again, kinds))
    assert all(file.startswith(FORMATS[name].name(3)) for file in first)
    assert FORMATS[name].name(3).startswith("shard-00000003")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("place", ["local", "s3"])
def test_every_record_comes_back(
    name: str, place: str, record: Callable[..., Row], request: pytest.FixtureRequest
) -> None:
    base = request.getfixturevalue("tmp_path" if place == "local" else "bucket")
    rows, kinds = passing([row for shard in shards(record) for row in shard])
    data_uri = storage.join(str(base), "data")
    write(name, str(base), [rows[:8], rows[8:]], kinds)
    found = [row for shard in (0, 1) for row in FORMATS[name].read(data_uri, shard, None, kinds)]
    arrays = {field.name: [row.get(field.name) for row in rows] for field in kinds}
    wanted = pa.table(arrays, schema=kinds).to_pylist()
    assert [{field.name: row[field.name] for field in kinds} for row in found] == wanted
    assert all(set(row) == set(kinds.names) for row in found)
    encoded = FORMATS[name].encode(0, found[:8], kinds)
    assert encoded == FORMATS[name].encode(0, rows[:8], kinds), "read and written again"


@pytest.mark.parametrize("name", FORMATS)
def test_columns_are_chosen_and_pictures_left_alone(
    name: str, record: Callable[..., Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = schema()
    write(name, str(tmp_path), shards(record), kinds)
    read = FORMATS[name].read
    data_uri = str(tmp_path / "data")
    assert list(read(data_uri, 0, ["seed", "no such", "record"]))[1] == {
        "seed": 2**63 - 2,
        "no such": None,
        "record": 1,
    }
    pictures = [row["image"] is not None for row in read(data_uri, 0, ["image"])]
    assert pictures == [False, True, True, False]
    seen: list[str] = []
    real = storage.read_bytes
    monkeypatch.setattr(storage, "read_bytes", lambda uri: seen.append(uri) or real(uri))
    assert len(list(read(data_uri, 0, ["prompt"]))) == 4
    assert not [uri for uri in seen if uri.endswith("png")]
    if name == "folder":
        rows = read(data_uri, 0)
        assert [next(rows)["record"], next(rows)["record"]] == [0, 1]
        assert len([uri for uri in seen if uri.endswith("png")]) <= 2, "not all at once"


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("image_format", EXTENSION)
def test_huggingface_loads_images_with_all_columns(
    name: str, image_format: str, record: Callable[..., Row], tmp_path: Path
) -> None:
    rows, kinds = passing([record(k, image_format) for k in range(12)])
    write(name, str(tmp_path / "set"), [rows[:4], rows[4:8], rows[8:]], kinds)
    header = yaml.safe_dump(FORMATS[name].card(kinds, image_format))
    (tmp_path / "set" / "README.md").write_text(f"---\n{header}---\n# Set\n")
    loaded = datasets.load_dataset(str(tmp_path / "set"), cache_dir=str(tmp_path / "cache"))
    samples = list(loaded["train"])
    if name == "webdataset":
        samples = [{"image": row[EXTENSION[image_format]], **row["json"]} for row in samples]
    by_record = {row["record"]: row for row in samples}
    whole = name in ("parquet", "lance")
    assert set(by_record) == {k for k in range(12) if whole or k not in FAILED}
    for k, row in by_record.items():
        assert set(row) == set(kinds.names)
        assert row["seed"] == 2**63 - 1 - k
        assert row["negative_prompt"] == (None if k < 6 else "bad")
        assert (row["image"] is None) == (k in FAILED)
        assert row["image"] is None or row["image"].convert("RGB").size == (64, 64)
        assert [row[column] is None for column in PASSED if column != "box"] == [k % 2 > 0] * 29
        assert row["embedding"] == (None if k % 2 else [0.5, 1.0, -2.0])


@pytest.mark.parametrize("name", FORMATS)
def test_pictures_that_images_follow_are_pictures(
    name: str,
    record: Callable[..., Row],
    picture: Callable[[int], Image.Image],
    tmp_path: Path,
) -> None:
    """Two of each of the even records, none of the others; failed ones have none."""
    columns = conditioning(2)
    kinds = schema([pa.field(key, kind) for key, (kind, _) in PASSED.items()], stored=columns)
    rows, _ = passing([record(k) for k in range(12)])
    for row in rows:
        for number, column in enumerate(columns):
            followed = encode_picture(picture(100 * number + row["record"]), "png", 100)
            has_one = row["record"] % 2 == 0 and row["image"] is not None
            row[column] = {"bytes": followed, "path": None} if has_one else None
    write(name, str(tmp_path / "set"), [rows[:4], rows[4:8], rows[8:]], kinds)
    read = [
        row
        for shard in range(3)
        for row in FORMATS[name].read(str(tmp_path / "set" / "data"), shard, None, kinds)
    ]
    assert [[row[column] for column in columns] for row in read] == [
        [row[column] for column in columns] for row in rows
    ]
    assert FORMATS[name].encode(0, read[:4], kinds) == FORMATS[name].encode(0, rows[:4], kinds)
    header = yaml.safe_dump(FORMATS[name].card(kinds, "png"))
    (tmp_path / "set" / "README.md").write_text(f"---\n{header}---\n# Set\n")
    loaded = datasets.load_dataset(str(tmp_path / "set"), cache_dir=str(tmp_path / "cache"))
    for row in loaded["train"]:
        facts = row["json"] if name == "webdataset" else row
        for number, column in enumerate(columns):
            found = row[f"{column}.png" if name == "webdataset" else column]
            is_there = facts["record"] % 2 == 0 and facts["status"] == "ok"
            wanted = picture(100 * number + facts["record"]) if is_there else None
            assert (found is None) == (wanted is None)
            assert found is None or found.tobytes() == wanted.tobytes()  # type: ignore[union-attr]


@pytest.mark.parametrize("reader", ["polars", "duckdb"])
def test_other_readers_load_all_columns(
    reader: str, record: Callable[..., Row], tmp_path: Path
) -> None:
    rows, kinds = passing([record(k) for k in (1, 2, 4, 6)])
    kinds = kinds.remove(kinds.get_field_index("nothing"))  # infinite: in JSON only Python reads it
    for name in ("parquet", "folder"):
        write(name, str(tmp_path / name), [rows], kinds)
    parquet = str(tmp_path / "parquet" / "data" / "*.parquet")
    lines = str(tmp_path / "folder" / "data" / "shard-00000000" / "metadata.jsonl")
    if reader == "polars":
        found = [pl.read_parquet(parquet).to_dicts(), pl.read_ndjson(lines).to_dicts()]
    else:
        tables = [duckdb.sql(f"select * from '{path}'") for path in (parquet, lines)]
        found = [[dict(zip(t.columns, row, strict=True)) for row in t.fetchall()] for t in tables]
    for rows_found in found:
        assert [row["record"] for row in rows_found] == [1, 2, 4, 6]
        assert set(rows_found[1]) - {"file_name"} >= {*kinds.names} - {"image"}
        assert list(rows_found[1]["embedding"]) == [0.5, 1.0, -2.0]


# webdataset leaves a tar's file to the garbage collector.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.parametrize("image_format", EXTENSION)
def test_webdataset_iterates(image_format: str, record: Callable[..., Row], tmp_path: Path) -> None:
    write("webdataset", str(tmp_path), shards(record, image_format), schema())
    urls = f"{tmp_path}/data/shard-{{00000000..00000002}}.tar"
    reader = webdataset.WebDataset(urls, shardshuffle=False).decode("pil")
    samples = list(reader.to_tuple("__key__", EXTENSION[image_format], "json", "txt"))
    assert [key for key, *_ in samples] == [f"{k:012d}" for k in range(12) if k not in FAILED]
    for _, image, columns, text in samples:
        assert image.size == (64, 64)
        assert columns["prompt"] == text
        assert ["image", *columns] == schema().names
    gc.collect()


def test_pandas_reads_images_with_all_columns(record: Callable[..., Row], tmp_path: Path) -> None:
    for name in ("parquet", "folder"):
        write(name, str(tmp_path / name), shards(record), schema())
    frame = pd.read_parquet(tmp_path / "parquet" / "data")
    assert list(frame["record"]) == list(range(12))
    assert list(frame.columns) == schema().names
    assert Image.open(io.BytesIO(frame["image"][1]["bytes"])).size == (64, 64)
    folder = tmp_path / "folder" / "data" / "shard-00000001"
    good = pd.read_json(folder / "metadata.jsonl", lines=True)
    assert list(good.columns) == ["file_name", *schema().names[1:]]
    assert list(good["record"]) == [4, 6, 7]
    with Image.open(folder / good["file_name"][0]) as image:
        assert image.size == (64, 64)
    bad = pd.read_json(folder / "failed.jsonl", lines=True)
    assert (list(bad["record"]), list(bad["error"])) == ([5], ["no such image"])


def test_a_folders_metadata_is_written_last(record: Callable[..., Row]) -> None:
    files = list(FORMATS["folder"].encode(0, shards(record)[0], schema()))
    assert files == [
        "shard-00000000/000000000001.png",
        "shard-00000000/000000000002.png",
        "shard-00000000/failed.jsonl",
        "shard-00000000/metadata.jsonl",
    ]


def test_parquet_groups_rows_and_leaves_pictures_as_they_are(
    record: Callable[..., Row],
) -> None:
    rows, kinds = passing([{**record(1), "record": k} for k in range(40)])
    (data,) = FORMATS["parquet"].encode(0, rows, kinds).values()
    facts = pq.ParquetFile(io.BytesIO(data)).metadata
    assert [facts.row_group(n).num_rows for n in range(facts.num_row_groups)] == [32, 8]
    parts = [facts.row_group(0).column(n) for n in range(facts.num_columns)]
    codecs = {part.path_in_schema: part.compression for part in parts}
    assert codecs.pop("image.bytes") == "UNCOMPRESSED"
    assert set(codecs.values()) == {"ZSTD"}
    assert not any(part.has_dictionary_page for part in parts)


@pytest.mark.parametrize("name", FORMATS)
def test_columns_that_a_format_cannot_hold_are_named(name: str) -> None:
    for column, (kind, _) in PASSED.items():
        check_schema(name, schema([pa.field(column, kind)]))
    check_schema(name, schema([pa.field("profile_name", pa.string())]))
    ways = pa.list_(pa.map_(pa.string(), pa.string()))
    union = pa.dense_union([pa.field("a", pa.int64())])
    bad = [("u", union), ("m", ways), ("d", pa.decimal256(50, 2)), ("v", pa.list_view(pa.int8()))]
    bad += [("e", pa.struct([]))] if name == "parquet" else []
    bad += [("file_name", pa.string()), ("x_file_name", pa.string())] if name == "folder" else []
    for column, kind in bad:
        with pytest.raises(
            BadInput, match=r"do not know; drop it|output\.format=parquet|parquet cannot hold"
        ):
            check_schema(name, schema([pa.field(column, kind)]))


def test_json_says_what_parquet_would(record: Callable[..., Row]) -> None:
    rows, kinds = passing([record(k) for k in (2, 4)])
    files = FORMATS["folder"].encode(0, rows, kinds)
    lines = files["shard-00000000/metadata.jsonl"].splitlines()
    first = json.loads(lines[0])
    assert first["ratio"] == first["sharpness"] == pa.scalar(0.1, pa.float32()).as_py()
    assert first["when"] == "2024-05-06 07:08:09.000010Z"
    assert (first["price"], first["blob"], first["span"]) == ("12.50", "AP8K", 1500)
    assert len(lines) == 2
