"""One picture's bytes, and the generation parameters that travel inside a PNG.

Owns image formats and the text that AUTOMATIC1111's web UI and its kin read. Bytes depend on the
pixels and that text alone. Knows nothing of shards or of how pictures are made.
"""

import io
import json
import re
from collections.abc import Mapping
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

EXTENSION = {"png": "png", "webp": "webp", "webp-lossless": "webp", "jpeg": "jpg"}
"""File name extension by image format."""

# What the web UI calls our samplers, and the schedule it must be told. It reads a missing schedule
# type as "Automatic", which is Karras for the DPM++ family: there the plain one has to be named.
A1111: dict[str, tuple[str, str | None]] = {
    "ddim": ("DDIM", None),
    "ddim_parallel": ("DDIM", None),
    "dpmpp_2m": ("DPM++ 2M", "Uniform"),
    "dpmpp_2m_karras": ("DPM++ 2M", "Karras"),
    "dpmpp_2m_sde": ("DPM++ 2M SDE", "Uniform"),
    "dpmpp_2m_sde_karras": ("DPM++ 2M SDE", "Karras"),
    "dpmpp_sde": ("DPM++ SDE", "Uniform"),
    "dpmpp_sde_karras": ("DPM++ SDE", "Karras"),
    "euler": ("Euler", None),
    "euler_a": ("Euler a", None),
    "euler_karras": ("Euler", "Karras"),
    "heun": ("Heun", None),
    "kdpm2": ("DPM2", "Uniform"),
    "kdpm2_a": ("DPM2 a", "Uniform"),
    "lcm": ("LCM", None),
    "lms": ("LMS", None),
    "pndm": ("PLMS", None),
    "unipc": ("UniPC", None),
    # A model's own sampler goes by its class; other classes' options would decide their name.
    "DDIMScheduler": ("DDIM", None),
    "EulerAncestralDiscreteScheduler": ("Euler a", None),
    "EulerDiscreteScheduler": ("Euler", None),
    "HeunDiscreteScheduler": ("Heun", None),
    "LCMScheduler": ("LCM", None),
    "LMSDiscreteScheduler": ("LMS", None),
    "PNDMScheduler": ("PLMS", None),
    "UniPCMultistepScheduler": ("UniPC", None),
}


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


def parameters_text(columns: Mapping[str, Any]) -> str:
    """A record's generation parameters as AUTOMATIC1111 writes them into its pictures."""
    sampler, schedule = A1111.get(columns["sampler"], (columns["sampler"], None))
    strength = columns.get("strength") if columns.get("init_image") is not None else None
    clip_skip = columns.get("clip_skip")
    facts = {
        "Steps": columns["steps"],
        "Sampler": sampler,
        "Schedule type": schedule,
        "CFG scale": _number(columns.get("guidance_scale")),
        "CFG rescale": _number(columns.get("guidance_rescale") or None),
        "Seed": columns["seed"],
        "Size": f"{columns['width']}x{columns['height']}",
        "Model hash": (columns.get("model_sha256") or "")[:10] or None,
        "Model": columns.get("model"),
        "Denoising strength": _number(strength),
        # There 1 is the text encoder's last layer, which diffusers counts as 0.
        "Clip skip": clip_skip + 1 if clip_skip else None,
        "RNG": "CPU",
        "Version": "rayjobs",
    }
    last = ", ".join(f"{key}: {_quoted(str(v))}" for key, v in facts.items() if v is not None)
    negative = columns.get("negative_prompt")
    lines = [_one_meaning(columns["prompt"])]
    if negative:
        lines.append(f"Negative prompt: {_one_meaning(negative)}")
    return "\n".join([*lines, last]).strip()


def _bare(image: Image.Image, modes: tuple[str, ...]) -> Image.Image:
    """The pixels without what a picture that was read from a file brings along."""
    pixels = image.copy() if image.mode in modes else image.convert("RGB")
    pixels.info = {}
    return pixels


def _number(value: float | None) -> str | None:
    """7.0 as 7."""
    return None if value is None else str(int(value) if value == int(value) else value)


def _quoted(value: str) -> str:
    """As JSON where the grammar's separators, a quote or outer spaces would be misread."""
    plain = not re.search(r'[,:\n]|^"', value) and value == value.strip()
    return value if plain else json.dumps(value, ensure_ascii=False)


def _one_meaning(prompt: str) -> str:
    """A line of a prompt that would begin the negative one gets a second, meaningless space."""
    return re.sub(r"(?m)^(\s*)Negative prompt:", r"\1Negative  prompt:", prompt)
