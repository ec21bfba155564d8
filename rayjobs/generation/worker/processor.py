"""A step for Ray Data programs: rows with prompts in, the same rows with images out.

Owns the step's keys, how its rows become records, and the check that Ray's checkpoints would work.
Writes nothing and knows nothing of data sets on storage.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import pyarrow as pa
import ray.data
from pydantic import Field

from rayjobs import storage
from rayjobs.config import BadInput, Config
from rayjobs.dataset.records import OVERRIDES, Row, schema, scores_asked
from rayjobs.diffusion.text.syntax import PromptSyntax
from rayjobs.generation.config import (
    ECONOMY,
    EngineConfig,
    GenerateConfig,
    ImageConfig,
    ModelConfig,
    QualityConfig,
    SamplerConfig,
    WorkersConfig,
)
from rayjobs.generation.prompts.snapshot import InlinePrompts
from rayjobs.generation.resolved import model_name
from rayjobs.generation.spec import determinism
from rayjobs.generation.spec.records import Record, derived_seed, optional_columns
from rayjobs.generation.worker.generator import RecordGenerator
from rayjobs.generation.worker.pool import STORAGE_PATIENCE_S, exit_if_device_lost

UserFunction = Callable[[dict[str, Any]], dict[str, Any]]
Processor = Callable[[ray.data.Dataset], ray.data.Dataset]


class ProcessorConfig(Config):
    model: ModelConfig
    sampler: SamplerConfig = SamplerConfig()
    image: ImageConfig = ImageConfig()
    strength: float = Field(default=0.5, gt=0, le=1)
    """How much of the schedule an init image goes through, where its row does not say."""
    engine: EngineConfig = EngineConfig()
    quality: QualityConfig = QualityConfig()
    workers: WorkersConfig = WorkersConfig()
    prompt_syntax: PromptSyntax = "plain"
    """How prompts and negative ones are written, where their row does not say."""
    job_seed: int = 0
    """Rows without a seed get one derived from this, their prompt and their `index`, else 0."""
    image_format: Literal["png", "webp", "webp-lossless", "jpeg"] = "png"
    """The pictures' format."""
    image_quality: int = Field(default=95, ge=1, le=100)
    """Of jpeg and webp pictures."""
    rows_per_batch: int = Field(default=64, ge=1)
    """Rows that a worker takes at once; it idles a little between batches."""

    @property
    def guided(self) -> bool:
        """Whether UNet calls have room for guidance; with a scale of at most 1 they have not."""
        scale = self.sampler.guidance_scale
        return scale is None or scale > 1

    def job(self) -> GenerateConfig:
        """The same settings as a job's, with nothing where prompts and output would be."""
        shared = ("model", "sampler", "image", "engine", "quality", "workers")
        values = self.model_dump(include=set(shared))
        output = {"uri": "-", "image_format": self.image_format, "quality": self.image_quality}
        prompts = {"inline": ["-"], "syntax": self.prompt_syntax}
        values |= {"prompts": prompts, "output": output}
        return GenerateConfig.model_validate(values | {"init": {"strength": self.strength}})


def build_processor(
    config: ProcessorConfig,
    preprocess: UserFunction | None = None,
    postprocess: UserFunction | None = None,
) -> Processor:
    """A function from a Dataset to a Dataset, as `ray.data.llm.build_processor` gives.

    Rows have a `prompt` and may have columns that override the settings for their row
    (`records.OVERRIDES`). Each gives one row: its own columns, then the record's (image, image_id,
    status, error, ...), with the overrides as they were used. A row that fails is kept, with its
    reason and no image. `preprocess` and `postprocess` map single rows before and after.

    Applying it raises BadInput when checkpoints are switched on that would not work.
    """
    workers = config.workers

    def process(dataset: ray.data.Dataset) -> ray.data.Dataset:
        _check_checkpoints(dataset)
        if preprocess is not None:
            dataset = dataset.map(preprocess)
        dataset = dataset.map_batches(
            ImageStep,
            fn_constructor_args=(config.model_dump(mode="json"),),
            compute=ray.data.ActorPoolStrategy(min_size=workers.min, max_size=workers.max_workers),
            batch_size=config.rows_per_batch,
            batch_format="pyarrow",
            num_cpus=workers.num_cpus,
            num_gpus=workers.num_gpus or None,
        )
        return dataset if postprocess is None else dataset.map(postprocess)

    return process


class ImageStep:
    """What Ray Data calls: holds the model, takes a batch of rows and yields it in parts."""

    def __init__(self, config: dict[str, Any]):
        storage.be_patient(STORAGE_PATIENCE_S)
        self.config = ProcessorConfig.model_validate(config)
        job = self.config.job()
        determinism.pin(job.workers)
        name = model_name(job.model.uri)
        self.generator = RecordGenerator(job, name, self.config.guided)
        scores = scores_asked(dict(job.quality))
        whole = schema(scores=scores, optional=optional_columns(job, InlinePrompts(job.prompts)))
        # Rows have no record number here.
        self.schema = pa.schema([field for field in whole if field.name != "record"])

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        _check_columns(batch, self.schema)
        if not len(batch):
            yield self._joined(batch, [])
            return
        with exit_if_device_lost():
            yield from self._parts(batch)

    def _parts(self, batch: pa.Table) -> Iterator[pa.Table]:
        """Rows in the batch's order, passed on a UNet batch at a time."""
        size, start = self.config.engine.batch_size, 0
        done: dict[int, Row] = {}
        for number, row in self._rows(batch):
            done[number] = row
            while start < len(batch):
                numbers = range(start, min(start + size, len(batch)))
                if not done.keys() >= set(numbers):
                    break
                part = batch.slice(start, len(numbers))
                yield self._joined(part, [done.pop(n) for n in numbers])
                start = numbers.stop

    def _rows(self, batch: pa.Table) -> Iterator[tuple[int, Row]]:
        """Each row's record columns, in the order in which they are made."""
        known = [name for name in ("prompt", "index", *OVERRIDES) if name in batch.column_names]
        records = []
        for number, row in enumerate(batch.select(known).to_pylist()):
            try:
                records.append(self._record(number, row))
            except ValueError as error:
                yield number, {"status": "failed", "error": str(error)}
        for record, row in self.generator.generate(records):
            yield record.number, row

    def _record(self, number: int, row: dict[str, Any]) -> Record:
        """A row's record; raises ValueError naming a value that cannot be used."""
        prompt = _value("prompt", row["prompt"], pa.string())
        if prompt is None:
            raise ValueError("there is no prompt")
        values = {name: _value(name, row.get(name), kind) for name, kind in OVERRIDES.items()}
        given = {name: value for name, value in values.items() if value is not None}
        if "seed" not in given:
            index = _value("index", row.get("index"), pa.int64()) or 0
            given["seed"] = derived_seed(self.config.job_seed, prompt, index)
        settings = self._settings() | given
        settings["economy"] = {name: settings.pop(name) for name in ECONOMY}
        return Record(number=number, prompt=prompt, init_uri=settings["init_image"], **settings)

    def _settings(self) -> dict[str, Any]:
        """The settings of rows without overrides."""
        sampler, image = self.config.sampler, self.config.image
        return {
            "init_image": None,
            "prompt_syntax": self.config.prompt_syntax,
            "negative_prompt": sampler.negative_prompt,
            "sampler": sampler.name,
            "steps": sampler.own_steps,
            "guidance_scale": sampler.guidance_scale,
            "guidance_rescale": sampler.guidance_rescale,
            "clip_skip": sampler.clip_skip,
            "width": image.width,
            "height": image.height,
            "strength": self.config.strength,
            **{name: getattr(sampler, name) for name in ECONOMY},
        }

    def _joined(self, given: pa.Table, rows: list[Row]) -> pa.Table:
        """The rows' own columns, then the record's; those that override have the values used."""
        added = [field for field in self.schema if field.name != "prompt"]
        names = {*OVERRIDES}.intersection(self.schema.names)
        table = given.drop_columns([name for name in given.column_names if name in names])
        for field in added:
            values = pa.array([row.get(field.name) for row in rows], field.type)
            table = table.append_column(field, values)
        return table


def _value(name: str, value: Any, kind: pa.DataType) -> Any:
    """A row's value in its column's type; tables with gaps have whole numbers as 20.0, and NaN."""
    if value is None or value != value:
        return None
    if pa.types.is_integer(kind) and isinstance(value, float) and not value.is_integer():
        raise ValueError(f"{name} is {value!r}, which is not a whole number")
    try:
        return pa.scalar(value, kind).as_py()
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        raise ValueError(f"{name} is {value!r:.80}, which is not {kind}") from None


def _check_columns(batch: pa.Table, added: pa.Schema) -> None:
    names = batch.column_names
    if "prompt" not in names:
        raise BadInput(f"the rows have no prompt column; they have {', '.join(names)}")
    for name in names:
        if name in added.names and name != "prompt" and name not in OVERRIDES:
            raise BadInput(f"the rows have a column {name!r}, which records need; rename it")


def _check_checkpoints(dataset: ray.data.Dataset) -> None:
    """Raise BadInput where Ray would write checkpoints and never read them.

    Ray leaves out what a checkpoint holds only where rows are read (seen in 2.60); of rows that the
    program brings itself, a second run makes and writes all again, without a word.
    """
    from ray.data._internal.logical.operators import Read
    from ray.data._internal.planner.planner import Planner

    contexts = (dataset.context, ray.data.DataContext.get_current())
    if all(context.checkpoint_config is None for context in contexts):
        return
    readers = getattr(Planner, "_CHECKPOINT_FILTER_OPS", (Read,))
    waiting = [dataset._logical_plan.dag]
    while waiting:
        operator = waiting.pop()
        if not operator.input_dependencies and not isinstance(operator, readers):
            raise BadInput(
                f"DataContext.checkpoint_config is set, but this Dataset begins with "
                f"{operator.name}, which Ray's checkpoints silently do not cover: a second run "
                "would make every image again. Begin with ray.data.read_* or ray.data.range, "
                "remove checkpoint_config, or use `rayjobs generate`"
            )
        waiting += operator.input_dependencies
