"""Snapshots of a job's prompts and init images' names: read once, then stored with the data set.

Owns how they are written and read at random. Knows nothing of prompt files' formats, of seeds or of
shards.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, overload

import pyarrow as pa
import pyarrow.parquet as pq

from rayjobs import storage
from rayjobs.config import BadInput
from rayjobs.dataset.records import OVERRIDES
from rayjobs.generation.prompts.columns import (
    ColumnTypes,
    check_rows,
    empty_structs,
    find_prompt_column,
    joined,
)
from rayjobs.generation.prompts.files import Chunk, read_chunks

if TYPE_CHECKING:
    from rayjobs.generation.config import PromptsConfig

ROWS_PER_GROUP = 4096
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tiff", ".gif")
NAMES = pa.schema([("name", pa.string())])


def write_snapshot(config: PromptsConfig, path: str, family: str | None = None) -> int:
    """Write the prompts as parquet at the local `path`; return how many there are.

    `family` is that of the job's model, for prompts that are pictures to be drawn again.
    Columns are `prompt`, the override columns that the source has, and what else it has; blank rows
    are left out. Raises BadInput or StorageError when the source cannot be read.
    """
    kinds = ColumnTypes()
    try:
        total = _write(config, kinds, path, family)
        if total is None:  # A column or its type showed late in the file; now all are known.
            total = _write(config, kinds, path, family)
    except pa.ArrowException as error:
        raise BadInput(f"prompts.uri: {config.uri}: {error}") from None
    if total is None:
        raise BadInput(f"prompts.uri: {config.uri} changed while it was read; start again")
    if total == 0:
        raise BadInput(f"prompts: there is no prompt in {config.uri or 'prompts.inline'}")
    return total


def write_names(names: Iterable[str], path: str) -> int:
    """Write init images' names as parquet at the local `path`; return how many there are."""
    names, total = iter(names), 0
    with pq.ParquetWriter(path, NAMES) as writer:
        while some := list(islice(names, ROWS_PER_GROUP)):
            writer.write_table(pa.table([some], schema=NAMES), row_group_size=ROWS_PER_GROUP)
            total += len(some)
    return total


def check_numbers(path: str) -> None:
    """Raise BadInput where a number of the snapshot is above 2**63 - 1: few read that in JSON."""
    facts = pq.ParquetFile(path).metadata
    for group in map(facts.row_group, range(facts.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            known = column.statistics
            if known is None or not known.has_min_max or not isinstance(known.max, int):
                continue
            if known.max >= 2**63:
                raise BadInput(
                    f"prompts.uri: the column {column.path_in_schema!r} has the number {known.max},"
                    " which few readers of JSON can hold; write it as text, or use "
                    "output.format=parquet"
                )


def write_like(wanted: Sequence[pa.Field], path: str, to: str) -> None:
    """Copy the snapshot at `path` to `to` with exactly the `wanted` passed-through columns.

    What it lacks is null. Raises BadInput when it has a column that is not wanted, or one whose
    values the wanted type cannot hold.
    """
    source = pq.ParquetFile(path)
    own, names = source.schema_arrow, [field.name for field in wanted]
    known = [field for field in own if field.name in {"prompt", *OVERRIDES}]
    for name in own.names:
        if name not in [*names, *(field.name for field in known)]:
            raise BadInput(
                f"--extend cannot add the column {name!r}, which the data set's records do not "
                f"have: they have {', '.join(names) or 'none of their own'}; drop it, or choose "
                "another output.uri"
            )
    schema = pa.schema([*known, *wanted])
    with pq.ParquetWriter(to, schema) as writer:
        for number in range(source.num_row_groups):
            table = source.read_row_group(number)
            columns = [_column_like(field, table) for field in schema]
            writer.write_table(pa.table(columns, schema=schema), row_group_size=ROWS_PER_GROUP)


def _column_like(wanted: pa.Field, table: pa.Table) -> pa.ChunkedArray | pa.Array:
    if wanted.name not in table.column_names:
        return pa.nulls(len(table), wanted.type)
    column = table[wanted.name]
    if column.null_count == len(column):
        return pa.nulls(len(table), wanted.type)
    try:
        if joined(wanted.type, column.type) == wanted.type:
            return column.cast(wanted.type)
    except pa.ArrowException:
        pass
    raise BadInput(
        f"--extend: the column {wanted.name!r} is {column.type}, but {wanted.type} in the data "
        "set's records; write it alike, or choose another output.uri"
    )


class Snapshot:
    """Random access to a snapshot's rows, a row group at a time."""

    def __init__(self, uri: str):
        self._groups = _RowGroups(uri)

    def __len__(self) -> int:
        return len(self._groups)

    def row(self, number: int) -> dict[str, Any]:
        group = self._groups.read(number // ROWS_PER_GROUP)
        return dict(group.slice(number % ROWS_PER_GROUP, 1).to_pylist()[0])

    @property
    def columns(self) -> list[str]:
        return list(self._groups.schema.names)

    def distinct(self, name: str) -> list[Any]:
        """The different values of a column."""
        return self._groups.distinct(name)

    @property
    def passed_through(self) -> list[pa.Field]:
        """The source's columns that the job does not use and copies into the records."""
        known = {"prompt", *OVERRIDES}
        return [field for field in self._groups.schema if field.name not in known]


class ImageNames(Sequence[str]):
    """The names that `write_names` wrote, a row group of them in memory at a time."""

    def __init__(self, uri: str):
        self._groups = _RowGroups(uri)

    def __len__(self) -> int:
        return len(self._groups)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        numbers = range(len(self))[index]
        if isinstance(numbers, range):
            return [self[number] for number in numbers]
        group = self._groups.read(numbers // ROWS_PER_GROUP)
        return str(group.column(0)[numbers % ROWS_PER_GROUP].as_py())


class InlinePrompts:
    """Prompts of the configuration itself, as rows; templates alone fill in one empty prompt."""

    columns = ("prompt",)

    def __init__(self, config: PromptsConfig):
        self._prompts = config.inline or ("",)

    def __len__(self) -> int:
        return len(self._prompts)

    def row(self, number: int) -> dict[str, Any]:
        return {"prompt": self._prompts[number]}


def list_pictures(uri: str) -> list[str]:
    """ImageNames of the pictures in a folder and below, sorted."""
    names = [name for name in storage.list_files(uri) if name.lower().endswith(PICTURES)]
    if not names:
        raise BadInput(f"init.uri: {uri} holds no picture ({', '.join(PICTURES)})")
    return names


class _RowGroups:
    """A parquet file, local or remote, with a small cache of row groups."""

    def __init__(self, uri: str):
        self._uri = uri
        try:
            self._file = pq.ParquetFile(storage.open_input(uri))
        except pa.ArrowException as error:
            raise BadInput(f"{uri} is damaged: {error}") from None
        self.schema: pa.Schema = self._file.schema_arrow
        self.read = lru_cache(maxsize=4)(self._read)

    def __len__(self) -> int:
        return int(self._file.metadata.num_rows)

    def distinct(self, name: str) -> list[Any]:
        values: dict[Any, None] = {}
        for number in range(self._file.num_row_groups):
            read = partial(self._file.read_row_group, number, columns=[name])
            values |= dict.fromkeys(storage.through(self._uri, read).column(0).unique().to_pylist())
        return list(values)

    def _read(self, number: int) -> pa.Table:
        return storage.through(self._uri, lambda: self._file.read_row_group(number))


def _write(config: PromptsConfig, kinds: ColumnTypes, path: str, family: str | None) -> int | None:
    """Write all rows; None when a later row changed the types, which `kinds` then knows."""
    chunks = _chunks(config, family)
    first = next(chunks, None)
    if first is None:
        return 0
    kinds.learn(first)
    if empty_structs(kinds.schema):
        for chunk in chunks:
            kinds.learn(chunk)
        for name in empty_structs(kinds.schema):
            raise BadInput(f"prompts.uri: {config.uri}: {name} has only {{}} in it; drop it")
        return None
    schema, total = kinds.schema, 0
    with pq.ParquetWriter(path, schema) as writer:
        for group in _groups(_tables(chain([first], chunks), kinds, schema)):
            writer.write_table(group, row_group_size=ROWS_PER_GROUP)
            total += len(group)
    return total if kinds.schema == schema else None


def _tables(chunks: Iterable[Chunk], kinds: ColumnTypes, schema: pa.Schema) -> Iterator[pa.Table]:
    """The rows as tables of `schema`; once it does not hold any more, none."""
    for chunk in chunks:
        kinds.learn(chunk)
        if kinds.schema == schema:
            yield kinds.table(chunk)


def _groups(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in full row groups: those are found by division."""
    rest = None
    for table in tables:
        rest = table if rest is None else pa.concat_tables([rest, table])
        while len(rest) >= ROWS_PER_GROUP:
            yield rest.slice(0, ROWS_PER_GROUP).combine_chunks()
            rest = rest.slice(ROWS_PER_GROUP)
    if rest is not None and len(rest):
        yield rest.combine_chunks()


def _chunks(config: PromptsConfig, family: str | None) -> Iterator[Chunk]:
    """Chunks with `prompt` first, whatever the source."""
    if config.uri is None:
        prompts = list(config.inline or ("",))
        yield Chunk({"prompt": prompts}, range(1, len(prompts) + 1), "prompts.inline", "prompt")
        return
    column = None
    for chunk in read_chunks(config.uri, family):
        if not chunk.columns:  # lines that are {}
            continue
        column = column or find_prompt_column(config.column, chunk)
        chunk = check_rows(chunk, column, config.syntax)
        if len(chunk):
            yield chunk
