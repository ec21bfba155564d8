"""Prompt files of every format, read a chunk of rows at a time; errors name the line.

Owns the formats: columns come out as they stand in the file. Knows nothing of what they mean.
"""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import IO, Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq

from rayjobs import storage
from rayjobs.config import BadInput
from rayjobs.generation.prompts.pictures import COLUMN as PICTURE
from rayjobs.generation.prompts.pictures import is_pictures, read_pictures

ROWS_PER_CHUNK = 4096
MAX_LINE_BYTES = 2**24
SEPARATORS = ";\t|"
NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"
POINTER = b"version https://git-lfs"
NumberedRow = tuple[int, Sequence[Any]]
"""A row's line in the file and its values."""


@dataclass(frozen=True)
class Chunk:
    """Some rows of a file, a column at a time."""

    columns: dict[str, list[Any] | pa.Array]
    places: Sequence[int | str]
    """Where each row stands: its line, or in parquet its row, the first being 1; or its name."""
    uri: str
    unit: str = "line"
    is_text: bool = False
    """Whether every value is text, numbers too."""

    def __len__(self) -> int:
        return len(self.places)

    def refusal(self, row: int, message: str) -> BadInput:
        """What to raise about one row of these."""
        return _refusal(self.uri, f"{self.unit} {self.places[row]}", message)


def read_chunks(uri: str, family: str | None = None) -> Iterator[Chunk]:
    """The rows of a prompt file, of all parquet files in a folder, or of the pictures in it, which
    a model of that `family` is to draw again.

    Raises BadInput or StorageError where one cannot be read.
    """
    if not storage.exists(uri):
        raise BadInput(f"prompts.uri: {uri} does not exist")
    files = [uri]
    if storage.is_folder(uri):
        names = storage.list_files(uri)
        files = _parquet_files(uri, names)
        if not files and is_pictures(names):
            for columns in read_pictures(uri, names, ROWS_PER_CHUNK, family):
                yield Chunk(dict(columns), columns[PICTURE], uri, unit="picture")
            return
        if not files:
            raise _unknown(uri)
    for file_uri in files:
        name = file_uri.lower().removesuffix(".gz")
        kind = name.rsplit(".", 1)[-1]
        zipped = name != file_uri.lower()
        if kind not in READERS or (zipped and kind == "parquet"):
            raise _unknown(uri)
        partitions = _partitions(file_uri.removeprefix(uri))
        with storage.open_input(file_uri) as file, _translate_errors(file_uri, kind):
            _check_pointer(file, file_uri)
            plain: Any = gzip.GzipFile(fileobj=file) if zipped else file
            for chunk in READERS[kind](plain, file_uri):
                yield _with_partitions(chunk, partitions)


def _partitions(path: str) -> dict[str, str | None]:
    """The columns that Hive, Spark and others write into folders' names, as in lang=en/."""
    parts = [part.partition("=") for part in path.split("/")[:-1] if "=" in part]
    return {key: None if text == NULL_PARTITION else unquote(text) for key, _, text in parts}


def _with_partitions(chunk: Chunk, partitions: dict[str, str | None]) -> Chunk:
    added = {key: [text] * len(chunk) for key, text in partitions.items()}
    return replace(chunk, columns=added | chunk.columns) if added else chunk


def _check_pointer(file: IO[bytes], uri: str) -> None:
    is_pointer = file.read(len(POINTER)) == POINTER
    file.seek(0)
    if is_pointer:
        raise BadInput(
            f"prompts.uri: {uri} is only git-lfs's pointer to a file; fetch it with: git lfs pull"
        )


def _parquet_files(folder: str, names: Sequence[str]) -> list[str]:
    """Spark and others put files of their own, with names like _SUCCESS, beside the data."""
    return [
        storage.join(folder, name)
        for name in names
        if name.endswith(".parquet") and not any(p[0] in "_." for p in name.split("/"))
    ]


def _unknown(uri: str) -> BadInput:
    kinds = ", ".join(READERS)
    return BadInput(
        f"prompts.uri: {uri} is none of {kinds}, nor one of them but parquet with .gz, nor a "
        "folder with parquet files, or with PNGs that carry their parameters"
    )


def _refusal(uri: str, place: str, message: str) -> BadInput:
    return BadInput(f"prompts.uri: {uri}, {place}: {message}")


@contextmanager
def _translate_errors(uri: str, kind: str) -> Generator[None]:
    try:
        yield
    except storage.StorageError:
        raise
    except (pa.ArrowException, OSError, EOFError, zlib.error) as error:
        raise BadInput(f"prompts.uri: {uri} cannot be read as {kind}: {error}") from None


def _lines(file: IO[bytes], uri: str) -> Iterator[str]:
    """Lines with their ends; memory holds one of them, whatever the file is."""
    buffered = io.BufferedReader(file, 2**20)  # ty: ignore[invalid-argument-type]
    try:
        lines = iter(partial(buffered.readline, MAX_LINE_BYTES), b"")
        for number, line in enumerate(lines, start=1):
            text = _decoded(line, number, uri)
            yield text.removeprefix("\ufeff") if number == 1 else text
    finally:
        if not file.closed:
            buffered.detach()  # the file stays its owner's to close


def _decoded(line: bytes, number: int, uri: str) -> str:
    place = f"line {number}"
    if len(line) == MAX_LINE_BYTES:
        raise _refusal(uri, place, "over 16 MiB long; is this a file of prompts?")
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise _refusal(uri, place, _encoding(line, error.start)) from None
    if "\0" in text:
        raise _refusal(uri, place, "has a NUL character; save the file as UTF-8 text")
    return text


def _encoding(line: bytes, at: int) -> str:
    wide = line[:2] in (b"\xff\xfe", b"\xfe\xff")
    guess = "UTF-16" if wide else "Windows-1252 or Latin-1"
    return (
        f"byte {at + 1} (0x{line[at]:02x}) is not UTF-8, perhaps {guess}; save the file as UTF-8, "
        f"such as with: iconv -f {'UTF-16' if wide else 'WINDOWS-1252'} -t UTF-8"
    )


def _read_txt(file: IO[bytes], uri: str) -> Iterator[Chunk]:
    """One prompt a line, whichever way lines end."""
    rows = (
        (number, (text,))
        for number, line in enumerate(_lines(file, uri), start=1)
        for text in line.rstrip("\r\n").split("\r")
    )
    yield from _chunks(rows, ["prompt"], uri)


def _read_csv(file: IO[bytes], uri: str) -> Iterator[Chunk]:
    yield from _separated(csv.reader(_lines(file, uri), strict=True), uri, "csv")


def _read_tsv(file: IO[bytes], uri: str) -> Iterator[Chunk]:
    """Tab-separated text is mostly written without quoting: a quote there is a letter."""
    rows = csv.reader(_lines(file, uri), delimiter="\t", quoting=csv.QUOTE_NONE)
    yield from _separated(rows, uri, "tsv")


def _separated(reader: Any, uri: str, kind: str) -> Iterator[Chunk]:
    csv.field_size_limit(MAX_LINE_BYTES)
    rows = _numbered(reader, uri, kind)
    _, header = next(rows, (1, ()))
    if not header:
        raise BadInput(f"prompts.uri: {uri} is empty; its first line must name the columns")
    _check_separator(header, uri, kind)
    names = [name.strip() for name in header]
    _check_names(names, uri)
    yield from _chunks(_full(rows, len(names), uri, kind), names, uri)


def _check_separator(header: Sequence[str], uri: str, kind: str) -> None:
    others = SEPARATORS.replace("\t", ",") if kind == "tsv" else SEPARATORS
    found = next((mark for mark in others if mark in header[0]), None)
    if len(header) == 1 and found is not None:
        right = "tabs" if kind == "tsv" else "commas, or name a tab-separated file .tsv"
        message = f"the columns are separated by {found!r}, not as in {kind}; write {right}"
        raise _refusal(uri, "line 1", message)


def _numbered(reader: Any, uri: str, kind: str) -> Iterator[NumberedRow]:
    """Rows that are not blank, with the line at which each begins."""
    unquote = _unquoted if kind == "tsv" else str
    while True:
        line = reader.line_num + 1
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            way_out = "quote fields as a whole, and double the quotes inside"
            if "new-line character" in str(error):
                way_out = r"its lines end as old Macs' do; convert it: tr '\r' '\n' < IN > OUT"
            message = f"cannot be read as {kind}: {error}; {way_out}"
            raise _refusal(uri, f"line {line}", message) from None
        if values:
            yield line, [unquote(value) for value in values]


def _full(rows: Iterable[NumberedRow], width: int, uri: str, kind: str) -> Iterator[NumberedRow]:
    for line, values in rows:
        if len(values) != width:
            way_out = "quote fields with a comma in them" if kind == "csv" else "check the tabs"
            raise _refusal(
                uri,
                f"line {line}",
                f"has {len(values)} fields where the header has {width}; {way_out}",
            )
        yield line, values


def _chunks(rows: Iterable[NumberedRow], names: list[str], uri: str) -> Iterator[Chunk]:
    rows = iter(rows)
    while some := list(islice(rows, ROWS_PER_CHUNK)):
        columns = zip(*(values for _, values in some), strict=True)
        named = {name: list(column) for name, column in zip(names, columns, strict=True)}
        yield Chunk(named, [line for line, _ in some], uri, is_text=True)


def _unquoted(value: str) -> str:
    """A field that is quoted as a whole, as spreadsheets write it, without its quotes."""
    inner = value[1:-1]
    whole = len(value) > 1 and value[0] == value[-1] == '"'
    return inner.replace('""', '"') if whole and '"' not in inner.replace('""', "") else value


def _check_names(names: Sequence[str], uri: str) -> None:
    for number, name in enumerate(names, start=1):
        if not name:
            raise BadInput(f"prompts.uri: {uri}: column {number} has no name; name it or drop it")
        if name in names[: number - 1]:
            raise BadInput(f"prompts.uri: {uri} has the column {name!r} twice; rename one of them")


def _read_jsonl(file: IO[bytes], uri: str) -> Iterator[Chunk]:
    rows = (
        (number, _object(line, number, uri))
        for number, line in enumerate(_lines(file, uri), start=1)
        if line.strip()
    )
    while some := list(islice(rows, ROWS_PER_CHUNK)):
        names = dict.fromkeys(name for _, row in some for name in row)
        columns = {name: [row.get(name) for _, row in some] for name in names}
        yield Chunk(columns, [line for line, _ in some], uri)


def _object(line: str, number: int, uri: str) -> dict[str, Any]:
    try:
        row = json.loads(line, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        message = f"cannot be read as jsonl: {error}"
        raise _refusal(uri, f"line {number}", message) from None
    if isinstance(row, dict):
        return row
    kind = type(row).__name__
    raise _refusal(uri, f"line {number}", f'is a {kind}, not an object such as {{"prompt": "..."}}')


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    whole = dict(pairs)
    if len(whole) == len(pairs):
        return whole
    names = [name for name, _ in pairs]
    raise ValueError(f"the key {max(names, key=names.count)!r} is there twice")


def _read_parquet(file: IO[bytes], uri: str) -> Iterator[Chunk]:
    source = pq.ParquetFile(file)
    names = source.schema_arrow.names
    _check_names(names, uri)
    first = 1
    for batch in source.iter_batches(ROWS_PER_CHUNK):
        columns = dict(zip(names, map(_plain, batch.columns), strict=True))
        yield Chunk(columns, range(first, first + len(batch)), uri, unit="row")
        first += len(batch)


def _plain(column: pa.Array) -> pa.Array:
    """The same values without what is only a way of storing them."""
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    wide = pa.types.is_large_string(column.type) or pa.types.is_string_view(column.type)
    return column.cast(pa.string()) if wide else column


READERS: dict[str, Callable[[IO[bytes], str], Iterator[Chunk]]] = {
    "txt": _read_txt,
    "csv": _read_csv,
    "tsv": _read_tsv,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
}
