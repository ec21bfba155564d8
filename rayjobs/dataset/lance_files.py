"""Shards as files of Lance, and the Lance data set that an export's folder becomes.

Owns the encoding of such files and the versions that name them. A shard is a data file of its own,
with the same bytes for the same records; Lance learns of all of them at once, when all are there,
so that nobody reads half an export. `pylance` does the work, of the extra `lance`.
"""

import os
import tempfile
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from rayjobs import storage
from rayjobs.config import BadInput
from rayjobs.dataset.layout import Format
from rayjobs.dataset.records import Row

ROWS_AT_ONCE = 32


class Lance(Format):
    """Below the export's folder `data` is Lance's own folder of that name, too."""

    def name(self, shard: int) -> str:
        return f"shard-{shard:08d}.lance"

    def check(self, schema: pa.Schema) -> None:
        _library()

    def encode(self, shard: int, rows: Sequence[Row], schema: pa.Schema) -> dict[str, bytes]:
        lance = _library()
        arrays = [pa.array([row.get(field.name) for row in rows], field.type) for field in schema]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, self.name(shard))
            with lance.file.LanceFileWriter(str(path), schema) as writer:
                writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
            return {self.name(shard): path.read_bytes()}

    def _rows(
        self, uri: str, columns: Sequence[str] | None, schema: pa.Schema | None
    ) -> Iterator[Row]:
        lance = _library()
        with _local(uri) as path:
            if columns is not None:
                there = lance.file.LanceFileReader(path).metadata().schema.names
                columns = [name for name in columns if name in there]
            reader = lance.file.LanceFileReader(path, columns=columns)
            for batch in reader.read_all(batch_size=ROWS_AT_ONCE).to_batches():
                yield from batch.to_pylist()

    def card(self, schema: pa.Schema, image_format: str) -> dict[str, Any]:
        return {"configs": [{"config_name": "default", "data_files": "data/*.lance"}]}

    def seal(self, uri: str, schema: pa.Schema, splits: Mapping[str, Mapping[int, int]]) -> None:
        """Make the folder a Lance data set of these shards, with each of several splits a tag."""
        target = _Target(uri, schema)
        parts = {name: target.fragments(self, shards) for name, shards in splits.items()}
        every = [fragment for part in parts.values() for fragment in part]
        if target.holds(every):
            return
        if len(parts) > 1:
            for name, part in parts.items():
                target.tag(name, target.commit(part))
        target.commit(every)


class _Target:
    """The Lance data set at `uri`, which is begun where there is none."""

    def __init__(self, uri: str, schema: pa.Schema):
        self._lance = _library()
        self._place = uri if storage.is_remote(uri) else storage.absolute(uri)
        self._schema = schema
        self._options = _options() if storage.is_remote(uri) else None
        self._known = self._open()

    def fragments(self, form: Format, shards: Mapping[int, int]) -> list[Any]:
        """The shards that hold any record, as Lance names them; their numbers are their ids."""
        fragment = self._lance.fragment
        return [
            fragment.FragmentMetadata(
                number, [fragment.DataFile.create(self._known, form.name(number))], num_rows
            )
            for number, num_rows in sorted(shards.items())
            if num_rows
        ]

    def holds(self, fragments: Sequence[Any]) -> bool:
        """Whether these are what the newest version has."""
        there = [each.metadata for each in self._known.get_fragments()]
        return [_facts(each) for each in there] == [_facts(each) for each in fragments]

    def commit(self, fragments: Sequence[Any]) -> int:
        """A new version of these alone."""
        whole = self._lance.LanceOperation.Overwrite(self._schema, list(fragments))
        self._known = self._lance.LanceDataset.commit(
            self._place, whole, storage_options=self._options
        )
        return int(self._known.version)

    def tag(self, name: str, version: int) -> None:
        tags = self._known.tags
        (tags.update if name in tags.list() else tags.create)(name, version)

    def _open(self) -> Any:
        if storage.list_files(storage.join(self._place, "_versions")):
            return self._lance.dataset(self._place, storage_options=self._options)
        self.commit([])
        return self._known


def _facts(fragment: Any) -> tuple[Any, ...]:
    files = [(str(file.path), file.file_size_bytes) for file in fragment.files]
    return fragment.physical_rows, files


def _library() -> Any:
    try:
        import lance
        import lance.file
    except ImportError:
        raise BadInput(
            "output.format=lance needs pylance; install it: pip install 'rayjobs[lance]'"
        ) from None
    return lance


def _options() -> dict[str, str]:
    """S3 as the AWS variables name it; Lance reads the others of them itself."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if not endpoint:
        return {}
    return {"aws_endpoint": endpoint, "allow_http": str(endpoint.startswith("http://")).lower()}


@contextmanager
def _local(uri: str) -> Generator[str]:
    if not storage.is_remote(uri):
        yield storage.absolute(uri)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "shard.lance")
        storage.get_file(uri, path)
        yield str(path)
