"""How a prompt is written: `plain`, or with AUTOMATIC1111's weights and breaks.

Owns that grammar: which words have which weight, where a chunk ends, and what is refused. Knows
neither tokens nor torch, so that a front end can refuse a prompt without loading either.
"""

import math
import re
from typing import Literal, NamedTuple, get_args

from rayjobs.diffusion.text.schedule import read, stages

PromptSyntax = Literal["plain", "a1111", "a1111-no-norm"]
"""`plain` is diffusers': brackets are text, and what is beyond the text encoder's length is cut.
`a1111` is the web UI's, whose emphasis keeps the mean of the encoder's output; `a1111-no-norm` is
its setting "Emphasis: No norm", which multiplies and no more, as sd_embed does."""
SYNTAXES: tuple[PromptSyntax, ...] = get_args(PromptSyntax)

PIECE = re.compile(
    r"\\[()\[\]\\]|\\|\(|\[|:\s*(?P<weight>[+-]?[.\d]+)\s*\)|\)|\]|[^\\()\[\]:]+|:", re.DOTALL
)
BREAK = re.compile(r"\s*\bBREAK\b\s*")
NETWORK = re.compile(r"<\w+:[^>]+>")
NUMBER_AT_END = re.compile(r":\s*[+-]?(\d+\.?\d*|\.\d+)\s*$")
LOOKS_WEIGHTED = re.compile(
    r"\([^()]+:\s*[+-]?[.\d]+\s*\)|\(\(.*\)\)|\[[^\[\]]+\]|\\[()\[\]]|\bBREAK\b"
    r"|(^|,)\s*\([^()]+\)\s*(,|$)",
    re.DOTALL,
)
FOREIGN = (
    (NETWORK.pattern, "name the file under loras, and remove it from the prompt"),
    (r"\bembedding:\S+", "name the file under words, and write the word alone"),
    (r"\{[^{}]*\|[^{}]*\}", "write one of the texts; a job's templates and axes make all of them"),
    (r"(?<!\w)__\w[\w/*-]*__(?!\w)", "wildcards are not filled in; a job's templates and axes are"),
    (
        r"\)(\++|--+)(?!\w)|[a-z]{2}\++(?=[\s,)]|$)|\)\d?\.\d+",
        "(word:1.1) weighs it, with prompt_syntax a1111",
    ),
    (r"(?<!\S)--(ar|chaos|iw|niji|no|q|seed|stylize|style|s|v)(?= \S)", "give it as a setting"),
)
"""What other programs read in a prompt, and what is to be done here."""
MANY_STEPS = 1000
"""After which a text has no other words to come."""
CLOSES = {")": ("(", 1.1), "]": ("[", 1 / 1.1)}
"""What a bracket closes, and the weight that it gives."""
_Section = list[tuple[str, list[float]]]
"""Texts, and the weights of the brackets around each."""


class Part(NamedTuple):
    """A piece of a prompt, and what the text encoder's output for it is multiplied by."""

    text: str
    weight: float


def looks_weighted(text: str) -> bool:
    """Whether a text is perhaps meant for a syntax with weights."""
    return LOOKS_WEIGHTED.search(text) is not None


def foreign(text: str) -> list[str]:
    """Warnings of what other programs read and this one draws as text."""
    found = ((re.search(pattern, text), way_out) for pattern, way_out in FOREIGN)
    return [
        f"{match[0].strip()!r:.60} is taken as plain text: {way_out}"
        for match, way_out in found
        if match
    ]


def weighs_whole(text: str) -> bool:
    """Whether the web UI would read the text's end as a weight of the whole prompt's guidance."""
    return "\n" not in text and NUMBER_AT_END.search(text) is not None


def spoken(text: str, syntax: str | None) -> str:
    """What a prompt says at last, without weights and breaks."""
    if syntax in (None, "plain"):
        return text
    last = stages(text, MANY_STEPS)[-1]
    return " ".join("".join(part.text for part in section) for section in parse(last))


def check_syntax(name: str, text: str, syntax: str, *, negative: bool = False) -> None:
    """Raise ValueError where a prompt, called `name`, asks for what its syntax has and we have not.

    All `plain` texts are taken as they are.
    """
    if syntax not in SYNTAXES:
        raise ValueError(f"prompt_syntax is {syntax!r}; it must be one of {', '.join(SYNTAXES)}")
    if syntax == "plain":
        return
    if match := NETWORK.search(text):
        raise ValueError(
            f"{name} has {match[0]!r}, which is not read there; name the file under loras, and "
            "remove it from the prompt"
        )
    if not negative and re.search(r"\bAND\b", text):
        raise ValueError(
            f"{name} has AND between prompts, which is not supported; write one of them"
        )
    try:
        read(text)
        parse(text)
    except ValueError as error:
        raise ValueError(f"{name} {error}") from None


def parse(text: str) -> list[list[Part]]:
    """The parts of a prompt in the web UI's grammar, a list for each section between BREAKs.

    `(a)` weighs 1.1, `[a]` 1 / 1.1, `(a:1.3)` 1.3; brackets in brackets multiply, one that is never
    closed reaches to the end, and a backslash makes the next bracket a letter. Raises ValueError
    naming a weight that is no number, or a BREAK in brackets.
    """
    sections: list[_Section] = [[]]
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def close(bracket: str, weight: float) -> None:
        for _, weights in sections[-1][opened[bracket].pop() :]:
            weights.append(weight)

    for match in PIECE.finditer(text):
        piece, number = match[0], match["weight"]
        bracket, usual = CLOSES.get(piece[-1], ("", 1.0))
        if piece[0] == "\\":
            sections[-1].append((piece[1:], []))
        elif piece in opened:
            opened[piece].append(len(sections[-1]))
        elif opened.get(bracket):
            close(bracket, usual if number is None else _number(number))
        else:
            first, *others = BREAK.split(piece)
            sections[-1].append((first, []))
            if others and any(opened.values()):
                raise ValueError(
                    "has BREAK in brackets; close them before it, and open them again after it"
                )
            sections += [[(other, [])] for other in others]
    for bracket, usual in CLOSES.values():
        while opened[bracket]:
            close(bracket, usual)
    return [_merged(section) for section in sections]


def _merged(section: _Section) -> list[Part]:
    """Neighbours of the same weight are one text: words are split into tokens together."""
    parts: list[Part] = []
    for text, weights in section:
        weight = math.prod(weights, start=1.0)
        if parts and parts[-1].weight == weight:
            parts[-1] = Part(parts[-1].text + text, weight)
        else:
            parts.append(Part(text, weight))
    return parts


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise ValueError(f"has the weight {text!r}, which is not a number") from None
    if not math.isfinite(number):
        raise ValueError(f"has the weight {text!r:.40}, which is too large")
    return number
