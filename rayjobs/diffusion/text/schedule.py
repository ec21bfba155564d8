"""Words of a prompt that change from step to step, as AUTOMATIC1111's web UI schedules them.

Owns that part of its grammar: `[a:b:0.5]` is a and, after half of the steps, b; `[a:10]` comes
after step 10, `[a::10]` goes; `[a|b]` alternates. Knows neither weights nor tokens.
"""

import itertools
import re
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

NUMBER = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*")
PIECE = re.compile(r"\\.|[^\\()\[\]:|]+|.", re.DOTALL)
CLOSES = {")": "(", "]": "["}


class Scheduled(NamedTuple):
    """`before` until step `when`, and `after` from then on."""

    before: "Parts"
    after: "Parts"
    when: str

    def end(self, num_steps: int) -> int:
        """With a point it is a share of the steps, else their number."""
        number = float(self.when)
        return min(num_steps, int(number * num_steps if "." in self.when else number))


class Alternate(NamedTuple):
    """The options by turns, one for each step."""

    options: tuple["Parts", ...]


Parts = tuple[str | Scheduled | Alternate, ...]


@dataclass
class _Open:
    """A bracket that is not closed yet: what is between the colons and bars in it."""

    bracket: str
    parts: list[str | Scheduled | Alternate] = field(default_factory=list)
    cuts: list[tuple[str, int]] = field(default_factory=list)
    """Colons and bars, and their places among the parts, where they stand as text."""

    def pieces(self) -> list[Parts]:
        """The parts between the cuts."""
        places = [-1, *(place for _, place in self.cuts), len(self.parts)]
        return [tuple(self.parts[first + 1 : last]) for first, last in itertools.pairwise(places)]

    def count(self, cut: str) -> int:
        return sum(1 for each, _ in self.cuts if each == cut)


def stages(text: str, num_steps: int) -> list[str]:
    """The text at each of the steps. Raises ValueError as `read` does."""
    parts = read(text)
    ends = sorted({num_steps, *_ends(parts, num_steps)})
    # As there, where the first of two texts lasts for one step more than its number.
    marks = [ends[bisect_left(ends, step)] for step in range(num_steps)]
    said = {mark: _at(parts, mark, num_steps) for mark in set(marks)}
    return [said[mark] for mark in marks]


def read(text: str) -> Parts:
    """A text's parts. Raises ValueError for a text with schedules that the web UI would not read
    as such, since other brackets around or in them are no pairs."""
    stack, is_odd = [_Open("")], False
    for match in PIECE.finditer(text):
        piece, here = match[0], stack[-1]
        if piece in CLOSES.values():
            stack.append(_Open(piece))
        elif CLOSES.get(piece) == here.bracket:
            odd, closed = _close(stack.pop(), piece)
            is_odd = is_odd or odd
            stack[-1].parts += closed
        else:
            is_odd = is_odd or piece in CLOSES or piece == "\\"
            if len(stack) == 1:  # a colon after a closed bracket may be read together with it
                after = bool(here.parts) and not isinstance(here.parts[-1], str)
                is_odd = is_odd or piece == "|" or (piece == ":" and after)
            if piece in (":", "|"):
                here.cuts.append((piece, len(here.parts)))
            here.parts.append(piece)
    is_odd = is_odd or len(stack) > 1
    parts = tuple(part for each in stack for part in (each.bracket, *each.parts))
    if is_odd and any(not isinstance(part, str) for part in parts):
        raise ValueError(
            "has [a:b:0.5] or [a|b] beside brackets, bars or colons that are none of such; close "
            "them, or write a backslash before each that is meant as text"
        )
    return parts


def _close(opened: _Open, bracket: str) -> tuple[bool, Parts]:
    """Whether brackets are none that the grammar has, and what they and their parts become."""
    pieces, colons, bars = opened.pieces(), opened.count(":"), opened.count("|")
    plain: Parts = (opened.bracket, *opened.parts, bracket)
    if bracket == ")":
        return bars > 0 or colons > 1, plain
    if bars:
        return colons > 0, plain if colons else (Alternate(tuple(pieces)),)
    last = "".join(part for part in pieces[-1] if isinstance(part, str))
    number = NUMBER.fullmatch(last) if len(pieces[-1]) == 1 else None
    if colons in (1, 2) and number:
        before = pieces[0] if colons == 2 else ()
        return False, (Scheduled(before, pieces[-2], number[1]),)
    return colons > 0, plain


def _ends(parts: Parts, num_steps: int) -> Iterator[int]:
    """The steps after which a text may be another."""
    for part in parts:
        if isinstance(part, Scheduled):
            yield from (end for end in [part.end(num_steps)] if end >= 1)
            yield from _ends(part.before + part.after, num_steps)
        elif isinstance(part, Alternate):
            yield from range(1, num_steps + 1)
            for option in part.options:
                yield from _ends(option, num_steps)


def _at(parts: Parts, step: int, num_steps: int) -> str:
    """The text at a step, of which the first is 1."""
    said = ""
    for part in parts:
        if isinstance(part, str):
            said += part
        elif isinstance(part, Scheduled):
            now = part.before if step <= part.end(num_steps) else part.after
            said += _at(now, step, num_steps)
        else:
            said += _at(part.options[(step - 1) % len(part.options)], step, num_steps)
    return said
