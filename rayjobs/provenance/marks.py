"""What a record's picture carries: the key that signs it, and what is wrong with its marks.

Owns the findings. How marks are written is `images.watermark`'s and `images.credentials`'; which
records must have them their data set's lock says.
"""

import io
from collections.abc import Iterator
from typing import Any

from PIL import Image

from rayjobs import storage
from rayjobs.config import BadInput
from rayjobs.images import credentials, watermark
from rayjobs.images.encode import extension_of
from rayjobs.provenance.keys import Provenance

RECORD = ("image_id", "model", "model_sha256")
"""What credentials name of a record, where it is known."""


def load_signing(keys: Provenance) -> credentials.Signing | None:
    """The operator's key, tried once; None where there are no credentials. Raises BadInput."""
    if keys.certificates is None or keys.key is None:
        return None
    certificates, key = _read(keys.certificates), _read(keys.key)
    try:
        signing = credentials.Signing(certificates, key, keys.timestamps)
        signing.sign(_blank(), "png", {})
    except credentials.BadKey as error:
        raise BadInput(f"provenance: {keys.key} with {keys.certificates}: {error}") from None
    return signing


def check_library() -> None:
    """Raise BadInput where credentials cannot be read."""
    try:
        credentials.load_library()
    except credentials.BadKey as error:
        raise BadInput(str(error)) from None


def is_marked(job: dict[str, Any]) -> bool:
    """Whether a segment's job, or an export's lock, asks for a watermark."""
    return bool(job["output"].get("provenance", {}).get("watermark"))


def watermark_fault(row: dict[str, Any]) -> str | None:
    """What is wrong with the watermark of a record's picture."""
    if row["image"] is None:
        return None
    try:
        found = watermark.read(Image.open(io.BytesIO(row["image"]["bytes"])))
    except (OSError, ValueError):  # whose hash says so already
        return None
    if found is None:
        return "the picture has no watermark; it was stripped, cropped or changed"
    if row.get("image_id") is not None and not row["image_id"].startswith(found):
        return f"the picture has the watermark of another one, whose image_id begins with {found}"
    return None


def credentials_fault(row: dict[str, Any]) -> str | None:
    """What is wrong with the content credentials of a record's picture."""
    if row["image"] is None:
        return None
    data = row["image"]["bytes"]
    found = credentials.read_credentials(data, extension_of(data))
    if found is None:
        return "the picture has no content credentials; they were stripped"
    if not found.is_valid:
        return f"the picture's content credentials do not fit it: {', '.join(found.faults)}"
    named = found.record.get("image_id")
    if row.get("image_id") is not None and named != row["image_id"]:
        return f"the picture has the content credentials of another one, {named}"
    return None


def faults(row: dict[str, Any], marked: bool, signed: bool) -> Iterator[str]:
    """What is wrong with all that a record's picture should carry."""
    found = [watermark_fault(row) if marked else None, credentials_fault(row) if signed else None]
    yield from filter(None, found)


def _read(uri: str) -> bytes:
    try:
        return storage.read_bytes(uri)
    except storage.NotThere:
        raise BadInput(f"provenance: {uri} does not exist; give a PEM file") from None


def _blank() -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, "PNG")
    return buffer.getvalue()
