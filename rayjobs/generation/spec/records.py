"""A job's records by arithmetic: record k is computed from k, whatever the number of records.

Owns the order of records and the settings of each. Knows nothing of how they are made.
"""

import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from rayjobs import storage
from rayjobs.config import BadInput
from rayjobs.dataset.records import OPTIONAL, OVERRIDES, SYNTAX, conditioning
from rayjobs.diffusion.text.syntax import PromptSyntax
from rayjobs.generation.config import ECONOMY, GenerateConfig, economy_of
from rayjobs.generation.prompts.templates import TemplateTexts

NUM_SEEDS = 2**63
Redo = Mapping[int, Mapping[int, int | None]]
"""Finished shards to make again: the records of each, and their new seeds, None for their own.

Of a shard without records those that failed are meant."""


class Rows(Protocol):
    """The prompts' snapshot, or anything like it."""

    @property
    def columns(self) -> Sequence[str]: ...
    def __len__(self) -> int: ...
    def row(self, number: int) -> dict[str, Any]: ...


class Pictured(Protocol):
    """A control, or an IP-Adapter."""

    @property
    def image(self) -> str | None: ...
    @property
    def column(self) -> str | None: ...


@dataclass(frozen=True, kw_only=True)
class Record:
    """The settings of record `number`; None stands for the model's own value."""

    number: int
    prompt: str
    negative_prompt: str | None
    seed: int
    sampler: str | None
    steps: int | None
    """None is the model's usual number, as of guidance."""
    guidance_scale: float | None
    guidance_rescale: float
    clip_skip: int | None
    width: int | None
    height: int | None
    init_image: str | None
    """The init image's name in its folder, or as the prompt file has it."""
    init_uri: str | None
    """That image's location; not part of the record, so that a moved job stays the same job."""
    strength: float
    prompt_syntax: PromptSyntax | None = None
    """Where records of the job have that column; without it they are plain."""
    economy: Mapping[str, Any] = field(default_factory=dict)
    """Those settings of ECONOMY of which records of the job have columns."""
    control_images: tuple[str | None, ...] = ()
    """The picture of each of the job's controls, as the prompt file has it or by its file's name;
    None where the row has no such control."""
    control_uris: tuple[str | None, ...] = ()
    """Those pictures' locations; not part of the record, as `init_uri`."""
    ip_adapter_images: tuple[str | None, ...] = ()
    """The picture of each of the job's IP-Adapters, as those of controls."""
    ip_adapter_uris: tuple[str | None, ...] = ()
    passed_through: Mapping[str, Any] = field(default_factory=dict)


class Spec:
    """All records of a job, or of a part of it that begins at a later prompt or a later seed.

    Their order, slowest first: prompts, the texts made of each, parameter axes (as the fields of
    ParametersConfig stand), init images, seeds. Raises BadInput when a column of the prompt file
    and the job's own keys would both decide the same thing.
    """

    def __init__(
        self,
        config: GenerateConfig,
        rows: Rows,
        init_images: Sequence[str] = (),
        first_prompt: int = 0,
        first_seed: int = 0,
    ):
        _check_columns(config, rows, init_images)
        self.config = config
        self.rows = rows
        self.init_images: Sequence[str | None] = init_images if len(init_images) else (None,)
        self.first_prompt = first_prompt
        self.first_seed = first_seed
        prompts = config.prompts
        self._texts = TemplateTexts(
            prompts.templates, prompts.axes, prompts.mode, prompts.samples, prompts.sample_seed
        )
        self._optional = optional_columns(config, rows)
        self._parameters = [
            (names, len(getattr(config.parameters, names[0]))) for names in config.parameters.axes
        ]
        self.num_prompts = max(0, len(rows) - first_prompt)
        self.num_texts = self._texts.num
        self.num_parameters = math.prod(length for _, length in self._parameters)
        self.num_inits = len(self.init_images)
        self.num_seeds = max(0, config.seeds.num - first_seed)

    def __len__(self) -> int:
        """As `num_records`, which also holds what Python's len() cannot."""
        return self.num_records

    @property
    def num_records(self) -> int:
        each = self.num_texts * self.num_parameters * self.num_inits * self.num_seeds
        return self.num_prompts * each

    @property
    def num_shards(self) -> int:
        return -(-self.num_records // self.config.output.images_per_shard)

    def record(self, number: int) -> Record:
        """Record `number`, from its number alone."""
        if not 0 <= number < self.num_records:
            raise IndexError(f"record {number} of {self.num_records}")
        rest, seed = divmod(number, self.num_seeds)
        rest, init = divmod(rest, self.num_inits)
        rest, parameters = divmod(rest, self.num_parameters)
        prompt, text = divmod(rest, self.num_texts)
        row = self.rows.row(self.first_prompt + prompt)
        row = {key: value for key, value in row.items() if value is not None}
        values = self._settings() | self._combination(parameters)
        values["init_image"] = self.init_images[init]
        values |= {key: row[key] for key in OVERRIDES if key in row}
        values["economy"] = {key: values.pop(key) for key in ECONOMY if key in values}
        values["prompt"] = self._texts.text(row["prompt"], text)
        values["seed"] = self._seed(row.get("seed"), values["prompt"], self.first_seed + seed)
        values["init_uri"] = self._init_uri(values["init_image"], "init_image" in row)
        for kind, uses in (
            ("control", self.config.controls),
            ("ip_adapter", self.config.ip_adapters),
        ):
            images, uris = self._pictures(uses, row)
            values |= {f"{kind}_images": images, f"{kind}_uris": uris}
        others = {key: row[key] for key in row if key != "prompt" and key not in OVERRIDES}
        return Record(number=number, passed_through=others, **values)

    def _settings(self) -> dict[str, Any]:
        """The job's settings, where neither an axis nor the prompt's row has another value."""
        config = self.config
        return {
            "prompt_syntax": config.prompts.syntax if SYNTAX.name in self._optional else None,
            **{name: getattr(config.sampler, name) for name in ECONOMY if name in self._optional},
            "negative_prompt": config.sampler.negative_prompt,
            "sampler": config.sampler.name,
            "steps": config.sampler.own_steps,
            "guidance_scale": config.sampler.guidance_scale,
            "guidance_rescale": config.sampler.guidance_rescale,
            "clip_skip": config.sampler.clip_skip,
            "width": config.image.width,
            "height": config.image.height,
            "strength": config.init.strength,
        }

    def _combination(self, number: int) -> dict[str, Any]:
        """Combination `number` of the parameter axes; the last axis changes fastest."""
        values = {}
        for names, length in reversed(self._parameters):
            number, choice = divmod(number, length)
            values |= {name: getattr(self.config.parameters, name)[choice] for name in names}
        return values

    def _seed(self, from_row: int | None, prompt: str, index: int) -> int:
        """Seed `index` of a prompt; counted ones go round at the greatest seed there is."""
        seeds = self.config.seeds
        if from_row is not None:
            return (from_row + index) % NUM_SEEDS
        if seeds.derive is not None:
            return derived_seed(seeds.job_seed, prompt, index)
        return seeds.values[index] if seeds.values else seeds.start + index

    def _pictures(
        self, uses: Sequence[Pictured], row: dict[str, Any]
    ) -> tuple[tuple[str | None, ...], tuple[str | None, ...]]:
        """Names and locations of the pictures that a row has: of its own columns, or the job's."""
        images, uris = [], []
        for use in uses:
            from_row = row.get(use.column or "") or None
            named = (use.image or "").rpartition("/")[-1] or None
            images.append(named if from_row is None else from_row)
            own = from_row is not None
            uris.append(self._init_uri(from_row, True) if own else use.image)
        return tuple(images), tuple(uris)

    def _init_uri(self, name: str | None, from_row: bool) -> str | None:
        """A name in a prompt file is relative to that file, one of the folder to the folder."""
        if name is None or "://" in name or name.startswith("/"):
            return name
        if from_row:
            folder = (self.config.prompts.uri or "").rpartition("/")[0] or "."
            return storage.join(folder, name)
        return storage.join(self.config.init.uri or ".", name)


def optional_columns(config: GenerateConfig, rows: Rows) -> list[str]:
    """Those of records' optional columns that records of the job have."""
    given = {*rows.columns, *itertools.chain(*config.parameters.axes)}
    given |= economy_of(dict(config.sampler)).keys()
    given |= set() if config.prompts.syntax == "plain" else {SYNTAX.name}
    given |= {"control_images"} if config.controls else set()
    given |= {"ip_adapter_images"} if config.ip_adapters else set()
    return [name for name in OPTIONAL if name in given]


def stored_columns(config: GenerateConfig) -> list[str]:
    """The columns of control pictures that the job stores."""
    return conditioning(len(config.controls)) if config.output.control_images else []


def pictured(config: GenerateConfig) -> Iterator[tuple[str, Pictured]]:
    """Controls and IP-Adapters, by the keys that name them."""
    for kind in ("controls", "ip_adapters"):
        for number, use in enumerate(getattr(config, kind)):
            yield f"{kind}.{number}", use


def derived_seed(job_seed: int, prompt: str, index: int) -> int:
    """The first 63 bits of a hash, so that another prompt in the job shifts no seed."""
    digest = hashlib.sha256(f"{job_seed}|{prompt}|{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _check_columns(config: GenerateConfig, rows: Rows, init_images: Sequence[str]) -> None:
    columns = set(rows.columns)
    for key, use in pictured(config):
        if use.column not in (None, *columns - {"prompt"}):
            raise BadInput(
                f"{key}.column: {config.prompts.uri or 'prompts.inline'} has no column "
                f"{use.column!r}; it has {', '.join(rows.columns)}"
            )
    for name in columns.intersection(stored_columns(config)):
        raise BadInput(
            f"output.control_images makes a column {name}, and {config.prompts.uri} has one; "
            "rename that, or leave output.control_images out"
        )
    for names in config.parameters.axes:
        for name in columns.intersection(names, OVERRIDES):
            raise BadInput(
                f"parameters.{name} and the column {name} of {config.prompts.uri} both set "
                f"{name}; remove one of them"
            )
    has_column = "init_image" in columns
    if has_column and len(init_images):
        raise BadInput(
            f"init.uri, {config.init.uri}, and the column init_image of {config.prompts.uri} both "
            "name init images; remove one of them"
        )
    if config.parameters.strength and not (has_column or len(init_images)):
        raise BadInput(
            "parameters.strength changes nothing without init images; give init.uri or an "
            "init_image column, or remove it"
        )


def sizes_of(config: GenerateConfig) -> list[tuple[int | None, int | None]]:
    """Widths and heights of a job's pictures, but for rows of prompts that have their own."""
    widths = config.parameters.width or (config.image.width,)
    heights = config.parameters.height or (config.image.height,)
    if len(widths) == len(heights):  # of which longer ones are pairs
        return list(zip(widths, heights, strict=True))
    return [(width, height) for width in widths for height in heights]
