"""One picture's bytes, and the text that travels inside a PNG.

Owns image formats. Bytes depend on the pixels and that text alone. Knows nothing of shards or of
how pictures are made.
"""

import io

from PIL import Image
from PIL.PngImagePlugin import PngInfo

EXTENSION = {"png": "png", "webp": "webp", "webp-lossless": "webp", "jpeg": "jpg"}
"""File name extension by image format."""


def encode_picture(
    image: Image.Image, image_format: str, quality: int, parameters: str | None = None
) -> bytes:
    """The picture as png, webp, webp-lossless or jpeg; `quality` is that of jpeg and webp.

    `parameters` goes into a PNG's text chunk of that name; the other formats have no such place.
    """
    pixels = _bare(image, ("RGB", "L") if image_format == "jpeg" else ("RGB", "RGBA", "L"))
    buffer = io.BytesIO()
    if image_format == "png":
        text = PngInfo()
        if parameters is not None:
            text.add_text("parameters", parameters)  # tEXt; iTXt for what Latin-1 cannot say
        pixels.save(buffer, "PNG", compress_level=6, pnginfo=text)
    elif image_format == "webp":
        pixels.save(buffer, "WEBP", quality=quality, method=4)
    elif image_format == "webp-lossless":
        pixels.save(buffer, "WEBP", lossless=True, quality=80, method=4, exact=True)
    elif image_format == "jpeg":
        pixels.save(buffer, "JPEG", quality=quality, subsampling="4:4:4")
    else:
        raise ValueError(f"image format {image_format!r} is none of {', '.join(EXTENSION)}")
    return buffer.getvalue()


def extension_of(data: bytes) -> str:
    """The file name extension of an encoded picture, by its own first bytes."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    raise ValueError(f"a picture that begins with {data[:8]!r} is neither png, jpeg nor webp")


def _bare(image: Image.Image, modes: tuple[str, ...]) -> Image.Image:
    """The pixels without what a picture that was read from a file brings along."""
    pixels = image.copy() if image.mode in modes else image.convert("RGB")
    pixels.info = {}
    return pixels
