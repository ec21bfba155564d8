"""A picture to start from, opened: upright, RGB, fully decoded.

Owns which pictures are taken and how a bad one is told. Knows no torch, so that a process which
only decodes is small.
"""

import io

from PIL import Image, ImageOps, UnidentifiedImageError


def open_image(source: Image.Image | bytes | str) -> Image.Image:
    """An RGB image, upright, fully decoded. Raises ValueError that names no path."""
    try:
        if source == b"":
            raise ValueError("it is missing or empty")
        if isinstance(source, bytes):
            source = Image.open(io.BytesIO(source))
        elif isinstance(source, str):
            source = Image.open(source)
        upright: Image.Image = ImageOps.exif_transpose(source)
        return upright.convert("RGB")
    except FileNotFoundError:
        raise ValueError("init image cannot be read: no such file") from None
    except UnidentifiedImageError:
        raise ValueError("init image cannot be read: not a known image format") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ValueError(f"init image cannot be read: {reason}") from None
