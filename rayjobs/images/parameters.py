"""The generation parameters that travel inside a PNG, as AUTOMATIC1111's web UI writes and reads.

Owns that text's grammar and the web UI's names of samplers. Knows neither files nor how pictures
are made.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

OURS = "rayjobs"
"""The version that our own pictures name."""
MIN_FACTS = 3
"""A last line with fewer is a part of the prompt."""
KEY = re.compile(r"\s*(\w[\w \-/]*):\s*")

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
PLAIN = "Uniform"
NAMES: dict[tuple[str, str], str] = {}
"""Our name of each sampler and schedule of the web UI's."""
for _ours, (_label, _schedule) in A1111.items():
    NAMES.setdefault((_label, _schedule or PLAIN), _ours)
# What the web UI chooses by itself where its user leaves the schedule "Automatic".
AUTOMATIC = dict.fromkeys(("DPM++ 2M", "DPM++ SDE", "DPM++ 2S a", "DPM2", "DPM2 a"), "Karras")
AUTOMATIC |= dict.fromkeys(("DPM++ 2M SDE", "DPM++ 2M SDE Heun", "DPM++ 3M SDE"), "Exponential")
ECONOMY = {
    "guidance_interval": "Guidance interval",
    "cache_interval": "Cache interval",
    "timesteps": "Timesteps",
    "sigmas": "Sigmas",
}
"""What the web UI does not know, where a job has it."""
SUFFIX = re.compile(r" (Karras|Exponential|Polyexponential)$")


@dataclass(frozen=True)
class Parameters:
    """What a picture's text says; `facts` are the values of its last line by their names."""

    prompt: str
    negative_prompt: str | None
    facts: Mapping[str, str]


def parameters_text(columns: Mapping[str, Any]) -> str:
    """A record's generation parameters as AUTOMATIC1111 writes them into its pictures."""
    sampler, schedule = A1111.get(columns["sampler"], (columns["sampler"], None))
    strength = columns.get("strength") if columns.get("init_image") is not None else None
    clip_skip = columns.get("clip_skip")
    syntax = columns.get("prompt_syntax") or "plain"
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
        "Emphasis": "No norm" if syntax == "a1111-no-norm" else None,
        "Prompt syntax": None if syntax == "plain" else syntax,
        "Denoising strength": _number(strength),
        # There 1 is the text encoder's last layer, which diffusers counts as 0.
        "Clip skip": clip_skip + 1 if clip_skip else None,
        **{key: _economy(columns.get(name)) for name, key in ECONOMY.items()},
        "RNG": "CPU",
        "Version": OURS,
    }
    last = ", ".join(f"{key}: {_quoted(str(v))}" for key, v in facts.items() if v is not None)
    negative = columns.get("negative_prompt")
    lines = [_one_meaning(columns["prompt"])]
    if negative:
        lines.append(f"Negative prompt: {_one_meaning(negative)}")
    return "\n".join([*lines, last]).strip()


def read_parameters(text: str) -> Parameters | None:
    """A picture's generation parameters; None where the text has none but perhaps a prompt."""
    *lines, last = text.strip().split("\n")
    facts = _facts(last)
    if len(facts) < MIN_FACTS or "Steps" not in facts:
        return None
    split = (n for n, line in enumerate(lines) if line.lstrip().startswith("Negative prompt:"))
    first = next(split, len(lines))
    negative = "\n".join(lines[first:]).lstrip().removeprefix("Negative prompt:").removeprefix(" ")
    return Parameters("\n".join(lines[:first]), negative or None, facts)


def read_sampler(facts: Mapping[str, str]) -> str | None:
    """Our name of a picture's sampler and schedule, or None where we have no such sampler.

    A name that is not the web UI's is taken to be ours. Up to 1.8 the web UI wrote the schedule
    behind the sampler's name, since then it names every schedule but the sampler's plain one.
    """
    name = facts.get("Sampler", "")
    schedule = facts.get("Schedule type", PLAIN)
    if match := SUFFIX.search(name):
        name, schedule = name[: match.start()], match[1]
    if schedule == "Automatic":
        schedule = AUTOMATIC.get(name, PLAIN)
    if name not in {label for label, _ in NAMES}:
        return name if schedule == PLAIN else None
    return NAMES.get((name, schedule))


def _facts(line: str) -> dict[str, str]:
    """Values by name. One in quotes, brackets or braces is JSON, as extensions write it."""
    facts, at = {}, 0
    while at < len(line):
        match = KEY.match(line, at)
        if match is None:
            word, at = _until_comma(line, at)
            facts[word] = word  # as a name that is its own value is written
            continue
        facts[match[1]], at = _value(line, match.end())
    facts.pop("", None)
    return facts


def _value(line: str, at: int) -> tuple[str, int]:
    if line[at : at + 1] in ('"', "[", "{"):
        try:
            value, end = json.JSONDecoder().raw_decode(line, at)
        except (ValueError, RecursionError):
            return _until_comma(line, at)
        _, after = _until_comma(line, end)
        return value if isinstance(value, str) else line[at:end], after
    return _until_comma(line, at)


def _until_comma(line: str, at: int) -> tuple[str, int]:
    """The text up to the next comma, and where the one after that comma begins."""
    end = line.find(",", at)
    end = len(line) if end < 0 else end
    return line[at:end].strip(), end + 1


def _economy(value: Any) -> str | None:
    """Numbers with spaces between them; an interval of 1 is none."""
    if isinstance(value, list | tuple):
        return " ".join(str(_number(each)) for each in value)
    return None if value == 1 else _number(value)


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
