"""What one picture's file says of where it came from.

Owns the words. The picture may be anybody's.
"""

from rayjobs import storage
from rayjobs.config import BadInput
from rayjobs.images import watermark
from rayjobs.images.container import UnreadableImage
from rayjobs.images.credentials import BadKey, Found, read_credentials
from rayjobs.images.decode import decode
from rayjobs.images.encode import extension_of

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")


def is_picture(uri: str) -> bool:
    return uri.lower().endswith(ENDINGS) and storage.is_file(uri)


def tell(uri: str, trust: str | None = None) -> tuple[list[str], bool]:
    """Its marks in words, and whether there are any and none is wrong. Raises BadInput."""
    data = storage.read_bytes(uri)
    anchors = None if trust is None else storage.read_bytes(trust)
    try:
        found = watermark.read(decode(data).colours)
        extension = extension_of(data)
    except (UnreadableImage, ValueError) as error:
        raise BadInput(f"{uri}: the picture {error}") from None
    try:
        signed = read_credentials(data, extension, anchors)
    except BadKey as error:
        return [_watermark(found), f"credentials: not looked for: {error}"], found is not None
    lines = [_watermark(found), _credentials(signed)]
    return lines, (found is not None or signed is not None) and (signed is None or signed.is_valid)


def _watermark(found: str | None) -> str:
    return f"watermark: {'none' if found is None else f'an image_id that begins with {found}'}"


def _credentials(signed: Found | None) -> str:
    if signed is None:
        return "credentials: none"
    if not signed.is_valid:
        return f"credentials: they do not fit the picture: {', '.join(signed.faults)}"
    trusted = "trusted" if signed.is_trusted else "whom no given certificate (--trust) vouches for"
    named = f", image_id {signed.record['image_id']}" if signed.record.get("image_id") else ""
    return f"credentials: valid, signed by {signed.signer}, {trusted}{named}"
