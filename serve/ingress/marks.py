"""What a finished picture carries of where it came from: its watermark and its credentials.

Owns a served picture's id, a hash of what was asked for, and puts it into the picture. How that is
done is `rayjobs.images`'. Keeps nothing between calls: any thread may call.
"""

import hashlib
from dataclasses import fields, is_dataclass
from typing import Any

from rayjobs.dataset.records import image_id
from rayjobs.images import watermark
from rayjobs.images.encode import extension_of
from rayjobs.provenance.keys import Provenance
from rayjobs.provenance.marks import load_signing
from serve.images import to_image, to_pixels
from serve.protocol import ImagesRequest, Pixels

AROUND = ("id", "caller", "seeds", "partial_images", "progress", "deadline_s", "warnings")
"""Of a request, what changes nothing in a picture; its own seed stands for all of them."""


class Marks:
    """Marks and signs as one installation asks for. Raises BadInput for a key that is none."""

    def __init__(self, keys: Provenance):
        self._signing = load_signing(keys)
        self._is_marked = keys.watermark

    def image_id(self, request: ImagesRequest, seed: int) -> str | None:
        """The id of a request's picture; None where pictures carry none."""
        if not self._is_marked and self._signing is None:
            return None
        asked = ((f.name, getattr(request, f.name), f.default) for f in fields(request))
        given = {
            name: _short(value)
            for name, value, default in asked
            if name not in AROUND and value != default
        }
        return image_id(given | {"seed": seed})

    def mark(self, pixels: Pixels, name: str | None) -> Pixels:
        """The picture with its id in it, where pictures are watermarked."""
        if name is None or not self._is_marked:
            return pixels
        return to_pixels(watermark.mark(to_image(pixels), name))

    def sign(self, data: bytes, name: str | None, model: str) -> bytes:
        """The file with credentials, where there are any."""
        if name is None or self._signing is None:
            return data
        return self._signing.sign(data, extension_of(data), {"image_id": name, "model": model})


def _short(value: Any) -> Any:
    """What a request holds as JSON, with the hashes of pictures for the pictures."""
    if isinstance(value, Pixels):
        head = f"{value.mode} {value.width} {value.height} ".encode()
        return hashlib.sha256(head + value.data).hexdigest()
    if isinstance(value, tuple):
        return [_short(each) for each in value]
    if is_dataclass(value):
        return {field.name: _short(getattr(value, field.name)) for field in fields(value)}
    return value
