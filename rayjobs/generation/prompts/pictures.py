"""A folder of PNGs with AUTOMATIC1111's text as prompts: each picture's settings, played back.

Owns what of such a text this engine can do, what is refused, and what is told. The text's grammar
is `images.parameters`'.
"""

import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from typing import Any

from PIL import Image

from rayjobs import storage
from rayjobs.config import BadInput
from rayjobs.diffusion.request import check_side
from rayjobs.diffusion.sampler_names import CLASSES, SAMPLERS
from rayjobs.images.parameters import OURS, Parameters, read_parameters, read_sampler

READERS = 16
"""Files that are read at once: most of their time is storage's."""
OTHERS = (".jpg", ".jpeg", ".webp", ".avif")
COLUMN = "picture"
"""The column with a picture's name."""

TAKEN = {"Steps", "Sampler", "Schedule type", "CFG scale", "CFG rescale", "Seed", "Size"}
TAKEN |= {"Clip skip", "Emphasis", "Prompt syntax", "Version"}
OWN = {"Guidance interval", "Cache interval"}
"""Taken over of our own pictures: what others mean by such words is not known."""
# Beginnings of what is named when a picture was not made of its prompt and seed alone.
REFUSED = (
    "Hires", "First pass size", "Denoising strength", "Mask", "Inpaint", "Init image",
    "Conditional mask", "Image CFG scale", "Variation seed", "Seed resize", "ControlNet", "Control",
    "ADetailer", "Refiner", "Face restoration", "Hypernet", "Lora hashes", "AddNet", "LyCORIS",
    "Tiling", "Token merging", "NGMS", "Eta", "Sigma", "Schedule max", "Schedule min",
    "Schedule rho", "SGM noise", "Discard penultimate", "FreeU", "Dynamic thresholding", "SAG",
    "Skip Early CFG", "Old prompt editing", "Regional", "RP ", "Ultimate SD", "SD upscale",
    "Script", "Beta schedule", "Guidance interval", "Cache interval", "Timesteps", "Sigmas",
)  # fmt: skip
HARMLESS = ("Created Date", "Civitai metadata", "User", "RNG")
WAY_OUT = "remove the picture, or write the prompts into a file with the columns that you want"


def is_pictures(names: list[str]) -> bool:
    """Whether a folder's files are such pictures."""
    return any(_is_png(name) for name in names)


def read_pictures(
    folder: str, names: list[str], rows: int, family: str | None = None
) -> Iterator[dict[str, list[Any]]]:
    """Columns of at most `rows` pictures at a time, in the order of their names.

    `family` is that of the model which is to draw them. Tells on stderr what of them is not taken
    over. Raises BadInput naming a picture that cannot be played back, and why.
    """
    unread = next((name for name in names if name.lower().endswith(OTHERS)), None)
    if unread is not None:
        raise BadInput(
            f"prompts.uri: {folder} holds PNGs and {unread}; only PNGs' parameters are read, so "
            "take the others out"
        )
    names, num_foreign, left = sorted(filter(_is_png, names)), 0, dict[str, str]()
    with ThreadPoolExecutor(READERS, thread_name_prefix="parameters") as pool:
        for first in range(0, len(names), rows):
            found = list(pool.map(partial(_read, folder), names[first : first + rows]))
            made = [_row(folder, name, parameters, family) for name, parameters in found]
            keys = dict.fromkeys(chain.from_iterable(made))
            yield {key: [row.get(key) for row in made] for key in keys}
            foreign = [parameters.facts for _, parameters in found if not _is_ours(parameters)]
            num_foreign += len(foreign)
            for facts in foreign:
                left |= _left(facts, family)
    if num_foreign:
        listed = ", ".join(f"{key} ({value:.40})" for key, value in sorted(left.items()))
        print(
            f"prompts.uri: {folder}: pictures of another program, whose noise is another: "
            f"{num_foreign} will be alike, not equal; not taken over: {listed or 'nothing'}",
            file=sys.stderr,
        )


def _is_png(name: str) -> bool:
    hidden = any(part.startswith(".") for part in name.split("/"))
    return name.lower().endswith(".png") and not hidden


def _read(folder: str, name: str) -> tuple[str, Parameters]:
    """What a picture's text says; the picture itself is not decoded."""
    try:
        with storage.open_input(storage.join(folder, name)) as file:
            text = Image.open(file, formats=("PNG",)).info.get("parameters")
    except storage.StorageError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _refusal(folder, name, f"cannot be read as PNG: {error}; remove it") from None
    parameters = read_parameters(text) if isinstance(text, str) else None
    if parameters is None:
        raise _refusal(folder, name, "has no generation parameters; remove it from the folder")
    return name, parameters


def _row(folder: str, name: str, parameters: Parameters, family: str | None) -> dict[str, Any]:
    """A picture's settings as columns that override the job's."""
    facts = parameters.facts
    own = OWN if _is_ours(parameters) else set()
    made_otherwise = [key for key in facts if key.startswith(REFUSED) and key not in own]
    if made_otherwise:
        key = made_otherwise[0]
        problem = f"was made with {key} ({facts[key]:.40}), which is not done here; {WAY_OUT}"
        raise _refusal(folder, name, problem)
    try:
        width, height = _size(facts)
        return {
            "prompt": parameters.prompt,
            "negative_prompt": parameters.negative_prompt,
            "prompt_syntax": _syntax(facts),
            "seed": _number(facts, "Seed", int),
            "width": width,
            "height": height,
            "sampler": _sampler(facts),
            "steps": _number(facts, "Steps", int),
            "guidance_scale": _number(facts, "CFG scale", float),
            "guidance_rescale": _number(facts, "CFG rescale", float),
            "clip_skip": _clip_skip(facts) if _reads_clip_skip(facts, family) else None,
            **_economy(facts),
            COLUMN: name,
        }
    except ValueError as error:
        raise _refusal(folder, name, f"{error}; {WAY_OUT}") from None


def _syntax(facts: Mapping[str, str]) -> str:
    """The web UI's prompts are in its syntax, ours in that which they name."""
    if facts.get("Version") == OURS:
        return facts.get("Prompt syntax", "plain")
    emphasis = facts.get("Emphasis", "Original")
    syntaxes = {"Original": "a1111", "No norm": "a1111-no-norm"}
    if emphasis not in syntaxes:
        raise ValueError(f"has Emphasis {emphasis!r}, which is neither Original nor No norm")
    return syntaxes[emphasis]


def _economy(facts: Mapping[str, str]) -> dict[str, Any]:
    """Columns that are there only where a picture has them."""
    taken: dict[str, Any] = {}
    key = "Guidance interval"
    if key in facts:
        shares = facts[key].split()
        taken["guidance_interval"] = [_number({key: share}, key, float) for share in shares]
    if "Cache interval" in facts:
        taken["cache_interval"] = _number(facts, "Cache interval", int)
    return taken


def _sampler(facts: Mapping[str, str]) -> str | None:
    if "Sampler" not in facts:
        return None
    name = read_sampler(facts)
    if name in SAMPLERS or name in CLASSES:
        return name
    whole = " ".join(filter(None, (facts["Sampler"], facts.get("Schedule type"))))
    raise ValueError(f"was made with the sampler {whole!r}, which is none of {', '.join(SAMPLERS)}")


def _size(facts: Mapping[str, str]) -> tuple[int | None, int | None]:
    if "Size" not in facts:
        return None, None
    width, found, height = facts["Size"].partition("x")
    if not (found and width.isdecimal() and height.isdecimal()):
        raise ValueError(f"has Size {facts['Size']!r:.40}, which is not WIDTHxHEIGHT")
    check_side("width", int(width))
    check_side("height", int(height))
    return int(width), int(height)


def _clip_skip(facts: Mapping[str, str]) -> int | None:
    """There 1 is the text encoder's last layer, which diffusers counts as 0."""
    number = _number(facts, "Clip skip", int)
    return number - 1 if number is not None and number > 1 else None


def _reads_clip_skip(facts: Mapping[str, str], family: str | None) -> bool:
    """The web UI names a skip for SDXL as well, and leaves it undone there."""
    return family != "sdxl" or facts.get("Version") == OURS


def _number(facts: Mapping[str, str], key: str, kind: type[int] | type[float]) -> Any:
    if key not in facts:
        return None
    try:
        return kind(facts[key])
    except ValueError:
        raise ValueError(f"has {key} {facts[key]!r:.40}, which is not a number") from None


def _is_ours(parameters: Parameters) -> bool:
    return parameters.facts.get("Version") == OURS


def _left(facts: Mapping[str, str], family: str | None) -> dict[str, str]:
    """What a text says beyond what is taken over: such as the model, which is the job's."""
    taken = TAKEN if _reads_clip_skip(facts, family) else TAKEN - {"Clip skip"}
    return {k: v for k, v in facts.items() if k not in taken and not k.startswith(HARMLESS)}


def _refusal(folder: str, name: str, problem: str) -> BadInput:
    return BadInput(f"prompts.uri: {storage.join(folder, name)} {problem}")
