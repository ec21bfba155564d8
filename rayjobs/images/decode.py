"""A picture's bytes decoded: upright, sRGB, 8 bits, its transparency apart. For all programs.

Owns which formats are read, every conversion of pixels, and what a bad file is refused with. Of an
animation the first frame is taken. Keeps nothing between calls: any thread may call.
"""

import io
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from rayjobs.images.container import (
    Container,
    UnreadableImage,
    exif_orientation,
    read_container,
)

MAX_PIXELS = 2 * 89_478_485
"""Above it Pillow refuses too."""
MAX_PROFILE_BYTES = 4 * 2**20
WEB_FORMATS = ("PNG", "JPEG", "WEBP")
FORMATS = (
    *WEB_FORMATS,
    "GIF",
    "BMP",
    "DIB",
    "TIFF",
    "AVIF",
    "JPEG2000",
    "ICO",
    "PPM",
    "TGA",
    "QOI",
)

UNKNOWN = "is no picture in a format that is read here; save it as PNG, JPEG or WebP"
NOT_WEB = "is no PNG, JPEG or WebP file, whatever its name; save it as one of these"
EMPTY = "is empty; give the bytes of a PNG, JPEG or WebP file"
DAMAGED = "cannot be decoded, it is damaged or of an unusual kind; open it and save it again"
NO_MEMORY = "needs more memory than there is; make it smaller"
TOO_DEEP = "has grey values of neither 8 nor 16 bits; save it as an ordinary PNG"

NAMES = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90"
UPRIGHT = {number: Image.Transpose[name] for number, name in enumerate(NAMES.split(), 2)}
"""By EXIF's orientation."""


@dataclass(frozen=True)
class Picture:
    """A decoded picture: RGB colours and, where the file has one, an alpha channel (L)."""

    colours: Image.Image
    alpha: Image.Image | None = None

    def on_white(self) -> Image.Image:
        """RGB, with white behind what is transparent."""
        if self.alpha is None:
            return self.colours
        white = Image.new("RGB", self.colours.size, "white")
        return Image.composite(self.colours, white, self.alpha)

    def mask(self) -> Image.Image:
        """L: 255 where the picture is transparent; where nothing is, as bright as it is."""
        if self.alpha is None or self.alpha.getextrema() == (255, 255):
            return self.colours.convert("L")
        return ImageOps.invert(self.alpha)


def decode(
    data: bytes, max_pixels: int = MAX_PIXELS, formats: tuple[str, ...] = FORMATS
) -> Picture:
    """The picture in a file's bytes. Raises UnreadableImage, and nothing else.

    While it runs it takes some 20 bytes of memory for each pixel, and the file's size twice.
    """
    try:
        if not data:
            raise UnreadableImage(EMPTY)
        container = read_container(data)
        if container is not None:
            return _decode_container(container, max_pixels)
        if set(formats) <= set(WEB_FORMATS):
            raise UnreadableImage(NOT_WEB)
        return _decode_other(data, max_pixels, formats)
    except UnreadableImage:
        raise
    except MemoryError:
        raise UnreadableImage(NO_MEMORY) from None
    except Exception:  # decoders raise anything
        raise UnreadableImage(DAMAGED) from None


def open_image(source: Image.Image | bytes | str) -> Image.Image:
    """An init image: RGB, upright, on white. Raises ValueError that names no path."""
    return _open(source, "init image").on_white()


def open_mask(source: Image.Image | bytes | str) -> Image.Image:
    """An init image's mask: L, upright, 255 where the image is made anew. Raises ValueError."""
    return _open(source, "mask").mask()


def open_control(source: Image.Image | bytes | str) -> Image.Image:
    """A control's picture: RGB, upright, on white. Raises ValueError that names no path."""
    return _open(source, "control image").on_white()


def open_reference(source: Image.Image | bytes | str) -> Image.Image:
    """An IP-Adapter's picture: RGB, upright, on white. Raises ValueError that names no path."""
    return _open(source, "reference image").on_white()


def _open(source: Image.Image | bytes | str, what: str) -> Picture:
    try:
        if isinstance(source, Image.Image):
            return _decode_opened(source)
        if isinstance(source, str):
            with open(source, "rb") as file:
                source = file.read()
        return decode(source)
    except FileNotFoundError:
        raise ValueError(f"{what} cannot be read: no such file") from None
    except UnreadableImage as error:
        raise ValueError(f"{what} cannot be read: it {error}") from None
    except OSError as error:
        raise ValueError(f"{what} cannot be read: {error.strerror or DAMAGED}") from None
    except Exception:  # a lazily opened image is decoded here
        raise ValueError(f"{what} cannot be read: it {DAMAGED}") from None


def _decode_container(container: Container, max_pixels: int) -> Picture:
    size = (container.width, container.height)
    _check_size(size, max_pixels)
    image = Image.open(io.BytesIO(container.data), formats=(container.format,))
    if image.size != size:
        raise UnreadableImage(DAMAGED)
    # Fed in parts, a decoder that waits for more has all that it was given copied each time.
    image.decodermaxblock = len(container.data)
    image.load()
    turn = UPRIGHT.get(exif_orientation(container.exif or image.info.get("exif", b"")))
    return _convert(image if turn is None else image.transpose(turn), container.depth)


def _decode_other(data: bytes, max_pixels: int, formats: tuple[str, ...]) -> Picture:
    """A picture of a format whose files only Pillow understands."""
    Image.init()
    readable = [name for name in formats if name in Image.OPEN and name not in WEB_FORMATS]
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=readable)
    except UnidentifiedImageError:
        raise UnreadableImage(UNKNOWN) from None
    except Image.DecompressionBombError:
        raise UnreadableImage("has too many pixels; make it smaller") from None
    _check_size(image.size, max_pixels)
    return _decode_opened(image)


def _decode_opened(image: Image.Image) -> Picture:
    image.load()
    key = image.info.get("transparency")
    parts = key if isinstance(key, tuple) else (key,)
    is_deep = image.mode.startswith("I;16") or any(isinstance(p, int) and p > 255 for p in parts)
    return _convert(ImageOps.exif_transpose(image), 16 if is_deep else 8)


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    if size[0] * size[1] > max_pixels:
        raise UnreadableImage(
            f"is {size[0]}x{size[1]} pixels; make it {max_pixels} pixels or less in all"
        )


def _convert(image: Image.Image, depth: int) -> Picture:
    profile = image.info.get("icc_profile") or b""
    colours, alpha = _split(image, depth)
    return Picture(_to_srgb(colours, profile), alpha)


def _split(image: Image.Image, depth: int) -> tuple[Image.Image, Image.Image | None]:
    """Its colours and its alpha channel in 8 bits; `depth` is how many the file has."""
    key = image.info.get("transparency")
    if image.mode in ("P", "PA"):
        image = image.convert("RGB" if key is None and image.mode == "P" else "RGBA")
    elif image.mode in ("I", "F") or image.mode.startswith("I;"):
        image = _to_8_bits(image)
    elif image.mode == "1":
        image = image.convert("L")
    elif image.mode in ("La", "RGBa"):
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    if key is not None and image.mode in ("L", "RGB"):
        # A PNG's transparent colour, which Pillow leaves in the file's depth.
        parts, top = key if isinstance(key, tuple) else (key,), 2 ** min(depth, 8) - 1
        parts = tuple((part >> max(depth - 8, 0) & top) * 255 // top for part in parts)
        image.info["transparency"] = parts if len(parts) == 3 else parts[0]
        image = image.convert(image.mode + "A")
    if image.mode in ("LA", "RGBA"):
        return image.convert(image.mode[:-1]), image.getchannel("A")
    return image, None


def _to_8_bits(image: Image.Image) -> Image.Image:
    """The high byte of 16-bit greys, as Pillow takes of 16-bit colours; its own conversion cuts
    greys at 255."""
    order: Literal["big", "little"] = "big" if image.mode == "I;16B" else "little"
    data = image.tobytes()
    if image.mode in ("I;16", "I;16L", "I;16B", "I;16N"):
        high = data[0::2] if order == "big" else data[1::2]
    elif image.mode == "I":
        low, top = image.getextrema()
        if not (isinstance(low, int) and isinstance(top, int) and 0 <= low <= top <= 65535):
            raise UnreadableImage(TOO_DEEP)
        high = data[1::4]
    else:
        raise UnreadableImage(TOO_DEEP)
    grey = Image.frombytes("L", image.size, high)
    grey.info = image.info
    return grey


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """In RGB. A profile that is broken, large or of other colours is not heeded."""
    if profile and len(profile) <= MAX_PROFILE_BYTES:
        with suppress(ImageCms.PyCMSError, OSError):
            source, target = io.BytesIO(profile), ImageCms.createProfile("sRGB")
            return ImageCms.profileToProfile(image, source, target, outputMode="RGB") or image
    return image if image.mode == "RGB" else image.convert("RGB")
