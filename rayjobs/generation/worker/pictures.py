"""The pictures that records begin with or follow, read ahead of their requests.

Owns the way from a picture's location to its hash and its pixels. Knows nothing of the engine.
"""

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

from PIL import Image

from rayjobs import storage
from rayjobs.generation.spec.records import Record
from rayjobs.images.container import UnreadableImage
from rayjobs.images.sandbox import Sandbox

KEPT = 8
"""Pictures that wait for the next record, which often needs the same ones."""


@dataclass(frozen=True)
class Source:
    """A record's picture: its file's hash and its pixels, or why there are none."""

    sha256: str
    image: Image.Image | None
    error: str | None = None

    @property
    def pixels(self) -> Image.Image | bytes:
        """For a request: empty bytes fail at once, and the record then has the picture's error."""
        return self.image or b""


class Sources(NamedTuple):
    """A record's init image, and the pictures of its controls and IP-Adapters; None where it has
    none."""

    init: Source | None = None
    controls: tuple[Source | None, ...] = ()
    references: tuple[Source | None, ...] = ()

    @property
    def error(self) -> str | None:
        found = filter(None, (self.init, *self.controls, *self.references))
        return next((source.error for source in found if source.error), None)


NO_SOURCES = Sources()


class PictureReader:
    """Reads in threads of its own."""

    def __init__(self) -> None:
        self._read = lru_cache(maxsize=KEPT)(partial(read_picture, sandbox=Sandbox()))
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="reading")

    def begin(self, record: Record) -> Future[Sources] | None:
        """A record's pictures, once they are read; None where it has none."""
        if not any((record.init_uri, *record.control_uris, *record.ip_adapter_uris)):
            return None
        return self._threads.submit(self._sources, record)

    def _sources(self, record: Record) -> Sources:
        def read(uri: str | None, what: str) -> Source | None:
            return None if uri is None else self._read(uri, what)

        return Sources(
            read(record.init_uri, "init image"),
            tuple(read(uri, "control image") for uri in record.control_uris),
            tuple(read(uri, "reference image") for uri in record.ip_adapter_uris),
        )


def read_picture(uri: str, what: str, sandbox: Sandbox) -> Source:
    """The picture at `uri`. Raises storage.Unavailable when the storage does not answer."""
    try:
        data = storage.read_bytes(uri)
    except storage.Unavailable:
        raise
    except storage.NotThere:
        return Source("", None, f"{what} cannot be read: it is missing")
    except storage.StorageError:
        return Source("", None, f"{what} cannot be read: access to it is refused")
    sha256 = hashlib.sha256(data).hexdigest()
    try:
        return Source(sha256, sandbox.decode(data).on_white())
    except UnreadableImage as error:
        return Source(sha256, None, f"{what} cannot be read: it {error}")
