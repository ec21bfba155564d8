"""The columns of a prompt file: which is the prompt, which override, which pass through.

Owns their types and the checks of single values. Knows neither the files' formats nor the job. A
value of the right type that no image can have, such as a width of 70, passes: its records fail.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from rayjobs.config import BadInput
from rayjobs.dataset.json_rows import json_kind
from rayjobs.dataset.records import COLUMNS, OPTIONAL, OVERRIDES, SCORES, SYNTAX
from rayjobs.diffusion.text.syntax import check_syntax
from rayjobs.generation.prompts.files import Chunk

RESERVED = {*COLUMNS, *OPTIONAL, *(SCORES[key][0] for key in ("clip", "aesthetic", "safety"))}
RESERVED -= {*OVERRIDES, "prompt"}
"""The other scores' columns, such as `caption`, are reserved in jobs alone that ask for them."""
MAX_COLUMNS = 1000
EXACT_FLOATS = 2**53
"""Beyond this, not every whole number is a float."""


def find_prompt_column(wanted: str | None, chunk: Chunk) -> str:
    """The name of the prompts' column; checks the names of the others as well."""
    names = list(chunk.columns)
    column = wanted if wanted is not None else "prompt"
    near = [name for name in names if name.lower() == "prompt"]
    if column not in names and wanted is None and len(near) == 1:
        column = near[0]
    if column not in names:
        raise BadInput(
            f"prompts.column: {chunk.uri} has no column {column!r}; it has {', '.join(names)}"
        )
    return column


def check_rows(chunk: Chunk, column: str, syntax: str = "plain") -> Chunk:
    """The rows with a prompt, overrides in their own types; raises BadInput naming a bad row.

    `syntax` is that of prompts whose row names none.
    """
    _check_names(chunk, column)
    chunk = _without_blank_rows(chunk, column)
    prompts = chunk.columns.get(column, [None] * len(chunk))
    others = {name: values for name, values in chunk.columns.items() if name != column}
    columns = {"prompt": _parse_column("prompt", pa.string(), prompts, chunk)}
    for name, values in others.items():
        known = name in OVERRIDES
        columns[name] = _parse_column(name, OVERRIDES[name], values, chunk) if known else values
    chunk = replace(chunk, columns=columns)
    _check_syntax(chunk, syntax)
    return chunk


def _check_syntax(chunk: Chunk, usual: str) -> None:
    columns: dict[str, Any] = chunk.columns
    if usual == "plain" and SYNTAX.name not in columns:
        return
    nothing = pa.nulls(len(chunk), pa.string())
    named = columns.get(SYNTAX.name, nothing).fill_null(usual)
    negatives = columns.get("negative_prompt", nothing).fill_null("")
    rows = zip(columns["prompt"].to_pylist(), negatives.to_pylist(), named.to_pylist(), strict=True)
    for row, (prompt, negative, syntax) in enumerate(rows):
        try:
            check_syntax("prompt", prompt, syntax)
            check_syntax("negative_prompt", negative, syntax, negative=True)
        except ValueError as error:
            raise chunk.refusal(row, str(error)) from None


class ColumnTypes:
    """The columns' types, as far as the rows read so far show them."""

    def __init__(self) -> None:
        self._kinds: dict[str, pa.DataType] = {}

    @property
    def schema(self) -> pa.Schema:
        """A column in which nothing was ever written is one of text."""
        kinds = self._kinds.items()
        return pa.schema(
            [(n, pa.string() if pa.types.is_null(kind) else kind) for n, kind in kinds]
        )

    def learn(self, chunk: Chunk) -> None:
        """Widen types so that these rows fit; raises BadInput naming the row that cannot."""
        for name, values in chunk.columns.items():
            kind = self._with(name, self._kinds.get(name, pa.null()), values, chunk)
            if json_kind(kind) is None:
                raise BadInput(
                    f"prompts.uri: {chunk.uri}: column {name} holds {kind}, which records cannot "
                    "carry; drop it or write it as text"
                )
            self._kinds[name] = kind
        if len(self._kinds) > MAX_COLUMNS:
            raise BadInput(
                f"prompts.uri: {chunk.uri} has over {MAX_COLUMNS} columns; put what varies from "
                "row to row into one of them, as text"
            )

    def table(self, chunk: Chunk) -> pa.Table:
        """These rows, in the types known by now."""
        schema = self.schema
        missing = [None] * len(chunk)
        arrays = [
            _array(field.name, field.type, chunk.columns.get(field.name, missing), chunk)
            for field in schema
        ]
        return pa.Table.from_arrays(arrays, schema=schema)

    def _with(
        self, name: str, known: pa.DataType, values: list[Any] | pa.Array, chunk: Chunk
    ) -> pa.DataType:
        if isinstance(values, pa.Array):
            try:
                return joined(known, values.type)
            except pa.ArrowException:
                message = f"{name} is {values.type}, in rows before {known}; make them one type"
                raise chunk.refusal(0, message) from None
        try:
            return joined(known, _inferred(values))
        except (pa.ArrowException, OverflowError):
            for row, value in enumerate(values):
                try:
                    known = joined(known, pa.infer_type([value]))
                except (pa.ArrowException, OverflowError):
                    message = _misfit(name, value, known)
                    raise chunk.refusal(row, message) from None
            raise


def _inferred(values: list[Any]) -> pa.DataType:
    """Arrow's own guess, but for truth values among numbers, which it would take for 0 and 1."""
    types = {type(value) for value in values} - {type(None)}
    if types == {str}:
        return pa.string()  # Arrow imports pandas to find out: most of a second of a small job
    if bool in types and len(types) > 1:
        raise pa.ArrowTypeError("truth values and others")
    return pa.infer_type(values)


def empty_structs(schema: pa.Schema) -> list[str]:
    """Columns that hold {} and, so far, nothing that says what may be in there."""
    return [field.name for field in schema if _has_empty_struct(field.type)]


def _has_empty_struct(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        inner = [field.type for field in kind]
        return not inner or any(map(_has_empty_struct, inner))
    nested = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return nested and _has_empty_struct(kind.value_type)


def joined(a: pa.DataType, b: pa.DataType) -> pa.DataType:
    """A type that holds the values of both; raises ArrowException when there is none."""
    if a == b or pa.types.is_null(b):
        return a
    both = [pa.schema([("", a)]), pa.schema([("", b)])]
    kind = pa.unify_schemas(both, promote_options="permissive").field(0).type
    if pa.types.is_binary(kind) and pa.types.is_string(a) != pa.types.is_string(b):
        raise pa.ArrowTypeError("text and bytes")
    return kind


def _array(name: str, kind: pa.DataType, values: list[Any] | pa.Array, chunk: Chunk) -> pa.Array:
    if isinstance(values, pa.Array):
        return values if values.type == kind else values.cast(kind)
    try:
        return pa.array(values, kind)
    except (pa.ArrowException, ValueError, OverflowError):
        row = next(row for row, value in enumerate(values) if not _fits(value, kind))
        message = _misfit(name, values[row], kind)
        raise chunk.refusal(row, message) from None


def _misfit(name: str, value: Any, kind: pa.DataType) -> str:
    where = "" if pa.types.is_null(kind) else f", which {kind} of other rows cannot hold"
    return f"{name} is {value!r:.80}{where}; write it as text in all rows, or drop the column"


def _fits(value: Any, kind: pa.DataType) -> bool:
    try:
        pa.array([value], kind)
    except (pa.ArrowException, ValueError, OverflowError):
        return False
    return True


def _check_names(chunk: Chunk, column: str) -> None:
    for name in chunk.columns:
        if name == column:
            continue
        if name in RESERVED:
            problem = "which the records need; rename it"
        elif name == "prompt":
            problem = f"but prompts.column is {column!r}; rename or drop one of them"
        elif name.lower() in OVERRIDES and name not in OVERRIDES:
            problem = f"which overrides nothing; write it {name.lower()!r}, or rename it"
        else:
            continue
        raise BadInput(f"prompts.uri: {chunk.uri} has a column {name!r}, {problem}")


def _without_blank_rows(chunk: Chunk, column: str) -> Chunk:
    prompts = _values(chunk.columns.get(column, [None] * len(chunk)))
    blank = [r for r, text in enumerate(prompts) if text is None or text == "" or _is_space(text)]
    if not blank:
        return chunk
    for row in blank:
        for name, values in chunk.columns.items():
            value = values[row].as_py() if isinstance(values, pa.Array) else values[row]
            if name != column and value not in (None, ""):
                message = f"has no {column}, but {name}; write one, or remove the row"
                raise chunk.refusal(row, message)
    gone = set(blank)
    keep = [row for row in range(len(chunk)) if row not in gone]
    columns = {name: _taken(values, keep) for name, values in chunk.columns.items()}
    return replace(chunk, columns=columns, places=[chunk.places[row] for row in keep])


def _is_space(value: Any) -> bool:
    return isinstance(value, str) and value.isspace()


def _taken(values: list[Any] | pa.Array, rows: Sequence[int]) -> list[Any] | pa.Array:
    if isinstance(values, pa.Array):
        return values.take(pa.array(rows, pa.int64()))
    return [values[row] for row in rows]


def _values(values: list[Any] | pa.Array) -> list[Any]:
    return values.to_pylist() if isinstance(values, pa.Array) else values


def _parse_column(
    name: str, kind: pa.DataType, values: list[Any] | pa.Array, chunk: Chunk
) -> pa.Array:
    """A column that the job understands, each value checked."""
    parsed = []
    for row, value in enumerate(_values(values)):
        try:
            parsed.append(_parse(name, kind, value, chunk.is_text))
        except (ValueError, OverflowError) as error:
            raise chunk.refusal(row, f"{name} has {value!r:.80}, {error}") from None
    return pa.array(parsed, kind)


def _parse(name: str, kind: pa.DataType, value: Any, is_text: bool) -> Any:
    if value is None or (is_text and value == ""):
        return None
    if pa.types.is_string(kind):
        return _text(value)
    if pa.types.is_list(kind):
        return _numbers(name, kind.value_type, value, is_text)
    number = _number(value) if is_text else value
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise ValueError("which is not a number")
    return float(number) if pa.types.is_floating(kind) else _whole(name, number)


def _numbers(name: str, kind: pa.DataType, value: Any, is_text: bool) -> list[Any]:
    """A list; as text it is JSON."""
    try:
        values = json.loads(value) if is_text else value
    except ValueError:
        values = None
    if not isinstance(values, list | tuple) or None in values:
        raise ValueError("which is not a list of numbers, such as [0.2, 0.8]")
    return [_parse(name, kind, each, is_text=False) for each in values]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("which is not text")
    if "\0" in value:
        raise ValueError("which has a NUL character; remove it")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("which is not valid text: half of a surrogate pair") from None
    return value


def _number(text: str) -> int | float:
    for parse in (int, float):
        try:
            return parse(text)
        except ValueError:
            continue
    raise ValueError("which is not a number")


def _whole(name: str, number: int | float) -> int:
    """Numbers such as 20.0, as tables with gaps have them, are whole as well."""
    if isinstance(number, float) and not (number.is_integer() and abs(number) <= EXACT_FLOATS):
        raise ValueError("which is not a whole number")
    if name == "seed" and not 0 <= number < 2**63:
        raise ValueError("but a seed is in 0 .. 2**63 - 1")
    if name != "seed" and abs(number) >= 2**31:
        raise ValueError("which is far too large")
    return int(number)
