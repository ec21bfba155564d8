"""Where a job's prompts come from: any supported file, read once and kept with the data set.

Owns the file formats and the snapshot that workers read. Knows nothing of seeds or of shards.
"""

import csv
import io
import json
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from string import Formatter
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rayjobs import storage
from rayjobs.config import BadInput
from rayjobs.generation.config import PromptsConfig
from rayjobs.records import COLUMNS, OVERRIDES

ROWS_PER_GROUP = 4096
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tiff", ".gif")


def write_snapshot(config: PromptsConfig, path: str) -> int:
    """Write the prompts as parquet at the local `path`; return how many there are.

    Columns are `prompt`, the override columns that the source has, and what else it has. Raises
    BadInput or StorageError when the source cannot be read.
    """
    rows, writer, total = _read_rows(config), None, 0
    while chunk := list(islice(rows, ROWS_PER_GROUP)):
        schema = writer.schema if writer else _snapshot_schema(config, chunk)
        try:
            table = pa.Table.from_pylist(chunk, schema)
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise BadInput(f"prompts.uri: {config.uri}: {error}") from None
        writer = writer or pq.ParquetWriter(path, schema)
        writer.write_table(table, row_group_size=ROWS_PER_GROUP)
        total += len(chunk)
    if writer is None:
        raise BadInput(f"prompts: there is no prompt in {config.uri or 'prompts.inline'}")
    writer.close()
    return total


class Snapshot:
    """Random access to a snapshot's rows, a row group at a time."""

    def __init__(self, uri: str):
        self._file = pq.ParquetFile(storage.open_input(uri))
        self._group = lru_cache(maxsize=4)(self._read_group)

    def __len__(self) -> int:
        return int(self._file.metadata.num_rows)

    def row(self, number: int) -> dict[str, Any]:
        group: pa.Table = self._group(number // ROWS_PER_GROUP)
        return dict(group.slice(number % ROWS_PER_GROUP, 1).to_pylist()[0])

    @property
    def columns(self) -> list[str]:
        return list(self._file.schema_arrow.names)

    @property
    def passed_through(self) -> list[pa.Field]:
        """The source's columns that mean nothing to the job and go along into the records."""
        known = {"prompt", *OVERRIDES}
        return [field for field in self._file.schema_arrow if field.name not in known]

    def _read_group(self, number: int) -> pa.Table:
        return self._file.read_row_group(number)


def list_pictures(uri: str) -> list[str]:
    """Names of the pictures in a folder and below, sorted."""
    names = [name for name in storage.list_files(uri) if name.lower().endswith(PICTURES)]
    if not names:
        raise BadInput(f"init.uri: {uri} holds no picture ({', '.join(PICTURES)})")
    return names


def check_templates(config: PromptsConfig) -> None:
    """Raise BadInput when a template names a place that nothing fills, or an axis is never used."""
    known = set(config.axes) | ({"prompt"} if config.inline or config.uri else set())
    used: set[str] = set()
    for template in config.templates:
        places = template_places(template)
        used.update(places)
        for place in places:
            if place not in known:
                raise BadInput(
                    f"prompts.templates: {template!r} has {{{place}}}, but there is no such axis; "
                    f"known: {', '.join(sorted(known)) or 'none'}"
                )
    for axis in set(config.axes) - used:
        raise BadInput(f"prompts.axes.{axis} is used by no template")


def template_places(template: str) -> list[str]:
    """Names of the places in a template, each once, in the order in which they stand."""
    try:
        names = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
        return list(dict.fromkeys(names))
    except ValueError as error:
        raise BadInput(f"prompts.templates: {template!r}: {error}") from None


def _read_rows(config: PromptsConfig) -> Iterator[dict[str, Any]]:
    """Rows with `prompt` first, whatever the source."""
    if config.uri is None:
        # Without prompts of their own, templates stand alone: one row with nothing to fill in.
        yield from ({"prompt": text} for text in config.inline or ("",))
        return
    kind = config.uri.rsplit(".", 1)[-1].lower()
    if kind not in READERS:
        raise BadInput(f"prompts.uri: {config.uri} is none of {', '.join(READERS)}")
    if not storage.exists(config.uri):
        raise BadInput(f"prompts.uri: {config.uri} does not exist")
    column = None
    with storage.open_input(config.uri) as file:
        try:
            for row in READERS[kind](file):
                column = column or _prompt_column(config, list(row))
                text = row.pop(column, None)
                if text is None or not str(text).strip():
                    continue
                yield {"prompt": str(text), **row}
        except (pa.ArrowInvalid, UnicodeDecodeError, csv.Error, json.JSONDecodeError) as error:
            raise BadInput(f"prompts.uri: {config.uri} cannot be read as {kind}: {error}") from None


def _prompt_column(config: PromptsConfig, columns: list[str]) -> str:
    if config.column is not None and config.column in columns:
        return config.column
    near = [name for name in columns if name.lower() == "prompt"]
    if config.column is None and len(near) == 1:
        return near[0]
    raise BadInput(
        f"prompts.column: {config.uri} has no column {config.column or 'prompt'!r}; "
        f"it has {', '.join(columns)}"
    )


def _snapshot_schema(config: PromptsConfig, rows: list[dict[str, Any]]) -> pa.Schema:
    """Known columns have their own types; others are as the source has them, else text."""
    names = dict.fromkeys(name for row in rows for name in row)
    reserved = (set(COLUMNS) - set(OVERRIDES) - {"prompt"}) & set(names)
    if reserved:
        raise BadInput(
            f"prompts.uri: {config.uri} has a column {min(reserved)!r}, which the records need; "
            "rename it"
        )
    kinds: dict[str, pa.DataType] = {"prompt": pa.string(), **OVERRIDES}
    for name in names:
        if name not in kinds:
            kind = pa.array([row.get(name) for row in rows]).type
            kinds[name] = pa.string() if pa.types.is_null(kind) else kind
    return pa.schema([(name, kinds[name]) for name in names])


def _read_txt(file: Any) -> Iterator[dict[str, Any]]:
    with _text(file) as lines:
        for line in lines:
            yield {"prompt": line.rstrip("\r\n")}


def _read_csv(file: Any) -> Iterator[dict[str, Any]]:
    with _text(file) as lines:
        for row in csv.DictReader(lines):
            yield {name: _typed(name, value) for name, value in row.items() if name is not None}


def _read_tsv(file: Any) -> Iterator[dict[str, Any]]:
    """Tab-separated text is mostly written without quoting: a quote there is a letter."""
    with _text(file) as lines:
        rows = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        names = next(rows, [])
        for values in rows:
            pairs = zip(names, map(_unquoted, values), strict=False)
            yield {name: _typed(name, value) for name, value in pairs}


def _text(file: Any) -> io.TextIOWrapper:
    return io.TextIOWrapper(file, "utf-8-sig", newline="")


def _unquoted(value: str) -> str:
    """A field that is quoted as a whole, as spreadsheets write it, without its quotes."""
    inner = value[1:-1]
    whole = len(value) > 1 and value[0] == value[-1] == '"'
    return inner.replace('""', '"') if whole and '"' not in inner.replace('""', "") else value


def _typed(name: str, value: str | None) -> Any:
    """A separated file's text as its column's type; nothing written means not overridden."""
    kind = OVERRIDES.get(name)
    if name not in OVERRIDES or value is None:
        return value
    if value == "":
        return None
    try:
        return (
            int(value)
            if pa.types.is_integer(kind)
            else (float(value) if pa.types.is_floating(kind) else value)
        )
    except ValueError:
        raise BadInput(f"prompts.uri: column {name} has {value!r}, which is not a number") from None


def _read_jsonl(file: Any) -> Iterator[dict[str, Any]]:
    with _text(file) as lines:
        for line in lines:
            if line.strip():
                yield json.loads(line)


def _read_parquet(file: Any) -> Iterator[dict[str, Any]]:
    for batch in pq.ParquetFile(file).iter_batches(ROWS_PER_GROUP):
        yield from batch.to_pylist()


READERS: dict[str, Any] = {
    "txt": _read_txt,
    "csv": _read_csv,
    "tsv": _read_tsv,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
}
