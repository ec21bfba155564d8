"""Records as JSON: what of their types it keeps, and how the others are written.

Owns the way there and back. Text, numbers (NaN and infinities as Python and arrow write them),
truth values, lists and structs are themselves. Timestamps, dates and decimals become text, times
and durations counts of their unit, bytes base64. Knows no files.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
from pyarrow import types

from rayjobs.dataset.records import Row, pictures


def json_kind(kind: pa.DataType) -> pa.DataType | None:
    """The type that values of `kind` have in JSON, or None when it cannot hold them."""
    if is_list(kind):
        inside = json_kind(kind.value_type)
        return None if inside is None else pa.list_(inside)
    if types.is_struct(kind):
        inner = [(field.name, json_kind(field.type)) for field in kind.fields]
        return None if any(child is None for _, child in inner) else pa.struct(inner)
    if _is_bytes(kind) or _is_written(kind) or types.is_large_string(kind):
        return pa.string()
    if _is_count(kind):
        return pa.int64()
    plain = (types.is_string, types.is_boolean, types.is_integer, types.is_floating, types.is_null)
    return kind if any(is_kind(kind) for is_kind in plain) else None


def dump_rows(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> list[Row]:
    """Each row's columns but its pictures as JSON values, in the schema's order.

    Values go through their column's type first: what JSON says is what parquet would.
    """
    beside = pictures(schema)
    fields = [field for field in schema if field.name not in beside]
    columns = [
        [
            _to_json(value, field.type)
            for value in pa.array([row.get(field.name) for row in rows], field.type).to_pylist()
        ]
        for field in fields
    ]
    names = [field.name for field in fields]
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


def dump_line(row: Row) -> bytes:
    """A row as a line of JSON."""
    return json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def load_row(data: bytes, schema: pa.Schema | None) -> Row:
    """One row's columns; with a schema their values have its types again."""
    row: Row = json.loads(data)
    if schema is not None:
        for name in row.keys() & set(schema.names):
            row[name] = _from_json(row[name], schema.field(name).type)
    return row


def _to_json(value: Any, kind: pa.DataType) -> Any:
    if value is None:
        return None
    if is_list(kind):
        return [_to_json(child, kind.value_type) for child in value]
    if types.is_struct(kind):
        return {field.name: _to_json(value[field.name], field.type) for field in kind.fields}
    if _is_bytes(kind):
        return base64.b64encode(value).decode()
    if _is_written(kind):
        return pa.scalar(value, kind).cast(pa.string()).as_py()
    if _is_count(kind):
        return pa.scalar(value, kind).cast(_count_kind(kind)).as_py()
    return value


def _from_json(value: Any, kind: pa.DataType) -> Any:
    if value is None:
        return None
    if is_list(kind):
        return [_from_json(child, kind.value_type) for child in value]
    if types.is_struct(kind):
        return {field.name: _from_json(value[field.name], field.type) for field in kind.fields}
    if _is_bytes(kind):
        return base64.b64decode(value)
    if _is_written(kind):
        return pa.scalar(value, pa.string()).cast(kind).as_py()
    if _is_count(kind):
        return pa.scalar(value, _count_kind(kind)).cast(kind).as_py()
    return value


def is_list(kind: pa.DataType) -> bool:
    """Of any of arrow's kinds of lists."""
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind)


def _is_written(kind: pa.DataType) -> bool:
    return types.is_timestamp(kind) or types.is_date(kind) or types.is_decimal(kind)


def _is_count(kind: pa.DataType) -> bool:
    return types.is_time(kind) or types.is_duration(kind)


def _count_kind(kind: pa.DataType) -> pa.DataType:
    return pa.int32() if types.is_time32(kind) else pa.int64()
