"""The job by arithmetic: record k is computed from k, whatever the number of records.

Owns the order of records and what each one asks for. Knows nothing of how they are made.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Protocol

from rayjobs import storage
from rayjobs.generation.config import GenerateConfig
from rayjobs.generation.source import template_places
from rayjobs.records import OVERRIDES


class Rows(Protocol):
    """The prompts' snapshot, or anything like it."""

    def __len__(self) -> int: ...
    def row(self, number: int) -> dict[str, Any]: ...


@dataclass(frozen=True, kw_only=True)
class Record:
    """What record `number` asks for; None stands for the model's own value."""

    number: int
    prompt: str
    negative_prompt: str | None
    seed: int
    steps: int
    guidance_scale: float | None
    width: int | None
    height: int | None
    init_image: str | None
    """The init image's name as the user knows it: in its folder, or as the prompt file has it."""
    init_uri: str | None
    """Where that image is; not part of the record, so that a moved job stays the same job."""
    strength: float
    passed_through: Mapping[str, Any] = field(default_factory=dict)


class Spec:
    """All records of a job: prompts x texts made of each x init images x seeds, seeds fastest.

    The texts of a prompt are those of one template after the other; within a template, the place
    that stands last changes fastest.
    """

    def __init__(self, config: GenerateConfig, rows: Rows, init_images: Sequence[str] = ()):
        self.config = config
        self.rows = rows
        self.init_images = list(init_images) or [None]
        self._places = [
            [place for place in template_places(template) if place != "prompt"]
            for template in config.prompts.templates
        ]
        counts = [
            math.prod(len(config.prompts.axes[axis]) for axis in axes) for axes in self._places
        ]
        self._first_text = [0, *accumulate(counts)]
        self.num_texts = self._first_text[-1] or 1

    def __len__(self) -> int:
        seeds = self.config.seeds.count
        return len(self.rows) * self.num_texts * len(self.init_images) * seeds

    @property
    def num_shards(self) -> int:
        return -(-len(self) // self.config.output.images_per_shard)

    def shard(self, number: int) -> range:
        """The records of shard `number`."""
        size = self.config.output.images_per_shard
        return range(number * size, min((number + 1) * size, len(self)))

    def record(self, number: int) -> Record:
        """Record `number`, from its number alone."""
        if not 0 <= number < len(self):
            raise IndexError(f"record {number} of {len(self)}")
        rest, seed = divmod(number, self.config.seeds.count)
        rest, init = divmod(rest, len(self.init_images))
        prompt, text = divmod(rest, self.num_texts)
        row = {key: value for key, value in self.rows.row(prompt).items() if value is not None}
        asked = self._settings(init) | {key: row[key] for key in OVERRIDES if key in row}
        asked["seed"] += seed
        asked["init_uri"] = self._init_uri(asked["init_image"], "init_image" in row)
        others = {key: row[key] for key in row if key != "prompt" and key not in OVERRIDES}
        return Record(
            number=number, prompt=self._text(row["prompt"], text), passed_through=others, **asked
        )

    def _settings(self, init: int) -> dict[str, Any]:
        """The job's settings, where the prompt's row has none of its own."""
        config = self.config
        return {
            "negative_prompt": config.sampler.negative_prompt,
            "seed": config.seeds.start,
            "steps": config.sampler.steps,
            "guidance_scale": config.sampler.guidance_scale,
            "width": config.image.width,
            "height": config.image.height,
            "init_image": self.init_images[init],
            "strength": config.init.strength,
        }

    def _init_uri(self, name: str | None, from_row: bool) -> str | None:
        """A name in a prompt file is relative to that file, one of the folder to the folder."""
        if name is None or "://" in name or name.startswith("/"):
            return name
        if from_row:
            folder = (self.config.prompts.uri or "").rpartition("/")[0] or "."
            return storage.join(folder, name)
        return storage.join(self.config.init.uri or ".", name)

    def _text(self, prompt: str, number: int) -> str:
        """Text `number` of those that the templates make of a prompt."""
        if not self._places:
            return prompt
        template = next(t for t, first in enumerate(self._first_text[1:]) if number < first)
        number -= self._first_text[template]
        words = {"prompt": prompt}
        for axis in reversed(self._places[template]):
            choices = self.config.prompts.axes[axis]
            number, choice = divmod(number, len(choices))
            words[axis] = choices[choice]
        return self.config.prompts.templates[template].format(**words)
