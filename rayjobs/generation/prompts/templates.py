"""The texts that templates make of a prompt: text k from k, however many there are.

Owns placeholders, how axes combine (product, zip, sample) and the keyed permutation. Knows no
configuration model.
"""

import hashlib
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from string import Formatter

from rayjobs.config import BadInput

ROUNDS = 8


class TemplateTexts:
    """The texts of one template after the other; the last placeholder changes fastest.

    `axes` are the values of the placeholders, `mode` is product, zip or sample. Raises BadInput
    when the axes cannot be combined in that way.
    """

    def __init__(
        self,
        templates: Sequence[str],
        axes: Mapping[str, Sequence[str]],
        mode: str = "product",
        samples: int | None = None,
        sample_seed: int = 0,
    ):
        self.templates = templates
        self.axes = axes
        self.mode = mode
        self._seed = sample_seed
        self._placeholders = [
            [name for name in placeholders(template) if name != "prompt"] for template in templates
        ]
        self._sizes = [math.prod(len(axes[name]) for name in names) for names in self._placeholders]
        self._first = [0, *accumulate(self._count(t, samples) for t in range(len(templates)))]
        self.num = self._first[-1] or 1

    def text(self, prompt: str, number: int) -> str:
        """Text `number` of those made of `prompt`; without templates that is the prompt itself."""
        if not self.templates:
            return prompt
        template = bisect_right(self._first, number) - 1
        values = self._values(template, number - self._first[template], prompt)
        return self.templates[template].format(prompt=prompt, **values)

    def _values(self, template: int, number: int, prompt: str) -> dict[str, str]:
        names = self._placeholders[template]
        if self.mode == "zip":
            return {name: self.axes[name][number] for name in names}
        if self.mode == "sample":
            key = f"{self._seed}|{self.templates[template]}|{prompt}"
            digest = hashlib.sha256(key.encode()).digest()
            number = permuted(number, self._sizes[template], digest)
        values = {}
        for name in reversed(names):
            number, choice = divmod(number, len(self.axes[name]))
            values[name] = self.axes[name][choice]
        return values

    def _count(self, template: int, samples: int | None) -> int:
        text = self.templates[template]
        lengths = {name: len(self.axes[name]) for name in self._placeholders[template]}
        if self.mode == "zip":
            if len(set(lengths.values())) > 1:
                listed = ", ".join(f"{name} {length}" for name, length in lengths.items())
                raise BadInput(
                    f"prompts.mode zip needs axes of one length, but those of {text!r} have "
                    f"{listed} values; make them equal, or use mode product"
                )
            return max(lengths.values(), default=1)
        size = self._sizes[template]
        if self.mode != "sample" or samples is None:
            return size
        if samples > size:
            raise BadInput(
                f"prompts.samples is {samples}, but {text!r} has only {size} "
                f"combination{'s' if size > 1 else ''}; ask for at most that, or use mode product"
            )
        return samples


def check_placeholders(
    templates: Sequence[str], axes: Mapping[str, Sequence[str]], has_prompts: bool
) -> None:
    """Raise BadInput when nothing fills a placeholder, or an axis is never used."""
    known = {*axes, "prompt"} if has_prompts else set(axes)
    used: set[str] = set()
    for template in templates:
        names = placeholders(template)
        used.update(names)
        for name in names:
            if name not in known:
                raise BadInput(
                    f"prompts.templates: {template!r} has {{{name}}}, but there is no such axis; "
                    f"known: {', '.join(sorted(known)) or 'none'}"
                )
    for axis in sorted(set(axes) - used):
        raise BadInput(f"prompts.axes.{axis} is used by no template")


def placeholders(template: str) -> list[str]:
    """ImageNames of the placeholders in a template, each once, in their order."""
    try:
        parts = [part[1:] for part in Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise BadInput(
            f"prompts.templates: {template!r}: {error}; write {{{{ and }}}} for braces as such"
        ) from None
    for name, layout, conversion in parts:
        if layout or conversion:
            raise BadInput(
                f"prompts.templates: {template!r}: a placeholder is a name alone, as in {{{name}}}"
            )
    return list(dict.fromkeys(str(name) for name, _, _ in parts))


def permuted(number: int, size: int, key: bytes) -> int:
    """Where a permutation of 0 .. size - 1, chosen by `key`, puts `number`.

    A Feistel network permutes the next power of four; what falls outside goes round again, which
    at most a few times leads back inside.
    """
    half = max(1, -(-(size - 1).bit_length() // 2))
    while True:
        number = _feistel(number, half, key)
        if number < size:
            return number


def _feistel(number: int, half: int, key: bytes) -> int:
    mask, width = (1 << half) - 1, -(-half // 8)
    left, right = number >> half, number & mask
    for turn in range(ROUNDS):
        mixed = hashlib.shake_256(key + bytes([turn]) + right.to_bytes(width, "big"))
        left, right = right, left ^ (int.from_bytes(mixed.digest(width), "big") & mask)
    return left << half | right
