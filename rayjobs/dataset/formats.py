"""A shard as files: parquet, a WebDataset tar, or a folder of pictures with metadata.jsonl.

Owns names, layout and encoding of a data set's files; bytes depend on the records alone. Knows
nothing of how records are made or when their shard is finished.

A failed record has no picture. Parquet holds it among the others, with a null image. Readers of
tars and picture folders expect a picture of every sample (webdataset's `to_tuple` raises, Hugging
Face's tar reader infers its columns from the first five samples), so there failed records stand
aside: in the tar's first member `__failed-00000000__`, which both skip by its name, and in the
folder's failed.jsonl. `read` gives every record in order, whatever the format.
"""

import heapq
import io
import itertools
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import types

from rayjobs import storage
from rayjobs.config import BadInput
from rayjobs.dataset.json_rows import dump_line, dump_rows, is_list, json_kind, load_row
from rayjobs.dataset.lance_files import Lance
from rayjobs.dataset.layout import Format
from rayjobs.dataset.records import DTYPES, Row, is_conditioning, pictures
from rayjobs.images.encode import EXTENSION, extension_of

ROWS_PER_GROUP = 32
MAX_DIGITS = 38


class Parquet(Format):
    def name(self, shard: int) -> str:
        return f"shard-{shard:08d}.parquet"

    def encode(self, shard: int, rows: Sequence[Row], schema: pa.Schema) -> dict[str, bytes]:
        arrays = [pa.array([row.get(field.name) for row in rows], field.type) for field in schema]
        buffer = io.BytesIO()
        bare = {f"{name}.bytes" for name in pictures(schema)}  # which are compressed themselves
        pq.write_table(
            pa.Table.from_arrays(arrays, schema=schema),
            buffer,
            row_group_size=ROWS_PER_GROUP,
            compression={leaf: "zstd" for leaf in _leaves(schema) if leaf not in bare},
            use_dictionary=False,
        )
        return {self.name(shard): buffer.getvalue()}

    def _rows(
        self, uri: str, columns: Sequence[str] | None, schema: pa.Schema | None
    ) -> Iterator[Row]:
        with storage.open_input(uri) as file:
            for batch in pq.ParquetFile(file).iter_batches(ROWS_PER_GROUP, columns=columns):
                yield from batch.to_pylist()

    def check(self, schema: pa.Schema) -> None:
        _leaves(schema)

    def card(self, schema: pa.Schema, image_format: str) -> dict[str, Any]:
        return {"configs": [{"config_name": "default", "data_files": "data/*.parquet"}]}


class WebDataset(Format):
    """Samples are KEY.png (or .jpg, .webp), KEY.json and KEY.txt; KEY is the record's number. A
    picture of another column has its name before the extension."""

    def name(self, shard: int) -> str:
        return f"shard-{shard:08d}.tar"

    def encode(self, shard: int, rows: Sequence[Row], schema: pa.Schema) -> dict[str, bytes]:
        pairs = list(zip(rows, dump_rows(rows, schema), strict=True))
        failed = b"".join(dump_line(plain) for row, plain in pairs if row["image"] is None)
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            if failed:
                _add(tar, f"__failed-{shard:08d}__", failed)
            for row, plain in pairs:
                if row["image"] is not None:
                    key = f"{plain['record']:012d}"
                    members = {"json": dump_line(plain), "txt": plain["prompt"].encode()}
                    members |= dict(_pictures(row, schema))
                    for extension in sorted(members):
                        _add(tar, f"{key}.{extension}", members[extension])
        return {self.name(shard): buffer.getvalue()}

    def _rows(
        self, uri: str, columns: Sequence[str] | None, schema: pa.Schema | None
    ) -> Iterator[Row]:
        with storage.open_input(uri) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            members = iter(tar)
            first = next(members, None)
            failed: list[Row] = []
            if first is not None and first.name.startswith("__failed"):
                failed = [load_row(line, schema) for line in _content(tar, first).splitlines()]
            elif first is not None:
                members = itertools.chain([first], members)
            good = _samples(tar, members, columns, schema)
            for row in _in_order(good, failed):
                yield {**dict.fromkeys(_picture_names(schema)), **row}

    def card(self, schema: pa.Schema, image_format: str) -> dict[str, Any]:
        features = [
            {"name": EXTENSION[image_format], "dtype": "image"},
            *({"name": f"{name}.png", "dtype": "image"} for name in pictures(schema)[1:]),
            {"name": "json", "struct": _features(schema)},
            *({"name": name, "dtype": "string"} for name in ("txt", "__key__", "__url__")),
        ]
        return {
            "configs": [{"config_name": "default", "data_files": "data/*.tar"}],
            "dataset_info": {"config_name": "default", "features": features},
        }


class Folder(Format):
    """Pictures are named by their record's number; metadata.jsonl is written last."""

    def name(self, shard: int) -> str:
        return f"shard-{shard:08d}"

    def encode(self, shard: int, rows: Sequence[Row], schema: pa.Schema) -> dict[str, bytes]:
        files: dict[str, bytes] = {}
        good, failed = b"", b""
        for row, plain in zip(rows, dump_rows(rows, schema), strict=True):
            if row["image"] is None:
                failed += dump_line(plain)
                continue
            named: Row = {_file_key(name): None for name in pictures(schema)}
            for extension, picture in _pictures(row, schema):
                column, _, _ = extension.rpartition(".")
                file_name = f"{plain['record']:012d}.{extension}"
                files[f"{self.name(shard)}/{file_name}"] = picture
                named[_file_key(column or "image")] = file_name
            good += dump_line({**named, **plain})
        if failed:
            files[f"{self.name(shard)}/failed.jsonl"] = failed
        return {**files, f"{self.name(shard)}/metadata.jsonl": good}

    def _rows(
        self, uri: str, columns: Sequence[str] | None, schema: pa.Schema | None
    ) -> Iterator[Row]:
        failed: list[Row] = []
        if storage.exists(failed_uri := storage.join(uri, "failed.jsonl")):
            lines = storage.read_bytes(failed_uri).splitlines()
            failed = [load_row(line, schema) for line in lines]
        lines = storage.read_bytes(storage.join(uri, "metadata.jsonl")).splitlines()
        for row in _in_order((load_row(line, schema) for line in lines), failed):
            row |= dict.fromkeys(_picture_names(schema))
            for key in [key for key in row if _is_file_key(key)]:
                file_name, name = row.pop(key), key.removesuffix("file_name").rstrip("_") or "image"
                if file_name is not None and (columns is None or name in columns):
                    row[name] = _image(storage.read_bytes(storage.join(uri, file_name)))
            yield row

    def card(self, schema: pa.Schema, image_format: str) -> dict[str, Any]:
        features = [{"name": name, "dtype": "image"} for name in pictures(schema)]
        features += _features(schema)
        data_files = ["data/*/[0-9]*", "data/*/metadata.jsonl"]
        return {
            "configs": [{"config_name": "default", "data_files": data_files, "features": features}]
        }


FORMATS: dict[str, Format] = {
    "parquet": Parquet(),
    "webdataset": WebDataset(),
    "folder": Folder(),
    "lance": Lance(),
}


def check_schema(output_format: str, schema: pa.Schema) -> None:
    """Raise BadInput when a column's type or name cannot go into shards of that format."""
    for field in schema:
        if json_kind(field.type) is None or _is_too_precise(field.type):
            raise BadInput(
                f"column {field.name!r} is {field.type}, which readers of data sets do not know; "
                "drop it, or write it as text"
            )
        # Hugging Face takes such columns for the names of pictures.
        if output_format == "folder" and f"_{field.name}".endswith(("_file_name", "_file_names")):
            raise BadInput(
                f"column {field.name!r} has a name that means pictures in metadata.jsonl; rename "
                "it, or use output.format=parquet or webdataset"
            )
    FORMATS[output_format].check(schema)


def _is_too_precise(kind: pa.DataType) -> bool:
    """Only arrow itself knows decimals of more than 38 digits."""
    if is_list(kind):
        return _is_too_precise(kind.value_type)
    if types.is_struct(kind):
        return any(_is_too_precise(field.type) for field in kind.fields)
    return types.is_decimal(kind) and kind.precision > MAX_DIGITS


def _leaves(schema: pa.Schema) -> list[str]:
    """Parquet's own names for the columns' parts."""
    buffer = io.BytesIO()
    try:
        pq.write_table(schema.empty_table(), buffer)
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid) as error:
        raise BadInput(f"parquet cannot hold a column: {error}; drop or convert it") from None
    parts = pq.ParquetFile(buffer).schema
    return [parts.column(number).path for number in range(len(parts))]


def _samples(
    tar: tarfile.TarFile,
    members: Iterable[tarfile.TarInfo],
    columns: Sequence[str] | None,
    schema: pa.Schema | None,
) -> Iterator[Row]:
    for _, parts in itertools.groupby(members, key=lambda member: member.name.split(".")[0]):
        row: Row = dict.fromkeys(_picture_names(schema))
        for member in parts:
            column = member.name.rpartition(".")[0].partition(".")[2] or "image"
            if member.name.endswith(".json"):
                row |= load_row(_content(tar, member), schema)
            elif not member.name.endswith(".txt") and (columns is None or column in columns):
                row[column] = _image(_content(tar, member))
        yield row


def _file_key(column: str) -> str:
    """The key of a picture's file in metadata.jsonl, by which Hugging Face names its column."""
    return "file_name" if column == "image" else f"{column}_file_name"


def _is_file_key(key: str) -> bool:
    column = key.removesuffix("_file_name")
    return key == "file_name" or (column != key and is_conditioning(column))


def _picture_names(schema: pa.Schema | None) -> list[str]:
    return ["image"] if schema is None else pictures(schema)


def _pictures(row: Row, schema: pa.Schema) -> Iterator[tuple[str, bytes]]:
    """A row's pictures by what follows their sample's key: an extension, and before that of each
    but the image its column."""
    for name in pictures(schema):
        if row.get(name) is not None:
            data = row[name]["bytes"]
            column = "" if name == "image" else f"{name}."
            yield column + extension_of(data), data


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """A member without time or owner: those are TarInfo's defaults."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return b"" if file is None else file.read()


def _image(data: bytes) -> dict[str, Any]:
    return {"bytes": data, "path": None}


def _in_order(good: Iterable[Row], failed: Iterable[Row]) -> Iterator[Row]:
    return heapq.merge(good, failed, key=lambda row: row["record"])


def _features(schema: pa.Schema) -> list[dict[str, Any]]:
    """The columns but the pictures, as a card lists Hugging Face features."""
    fields = [field for field in schema if field.name not in pictures(schema)]
    return [{"name": field.name, **_feature(json_kind(field.type))} for field in fields]


def _feature(kind: Any) -> dict[str, Any]:
    if pa.types.is_struct(kind):
        return {"struct": [{"name": f.name, **_feature(f.type)} for f in kind.fields]}
    if pa.types.is_list(kind):
        inside = _feature(kind.value_type)
        return {"list": inside.get("dtype") or inside.get("struct") or inside}
    return {"dtype": DTYPES.get(str(kind), str(kind))}
