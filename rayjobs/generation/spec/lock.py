"""From a job's configuration to its segment in a data set's lock, and back.

Owns which keys decide records, and opens a segment's records again. The lock itself is
`dataset.lock`'s.
"""

import json
from dataclasses import replace
from typing import Any

import pyarrow as pa

from rayjobs.config import BadInput
from rayjobs.dataset.lock import Lock, Segment, names_uri, snapshot_uri
from rayjobs.dataset.records import (
    COLUMNS,
    OPTIONAL,
    SCORES,
    pictures,
    schema,
    scores_asked,
)
from rayjobs.generation.config import ECONOMY, GenerateConfig, economy_of
from rayjobs.generation.prompts.snapshot import ImageNames, Snapshot
from rayjobs.generation.resolved import ResolvedConfig
from rayjobs.generation.spec.records import Record, Spec, optional_columns, stored_columns

NOT_LOCKED = {"workers"}
"""Parts of a configuration that change how a job runs, but not what it makes."""

_LAYOUTS = {"auto": True, True: "true", False: False}
"""What locks have for `channels_last`: true, as those that are older than `auto`, is the default.
"""


def job_part(config: GenerateConfig) -> dict[str, Any]:
    """The keys that decide what is made, as the lock has them."""
    whole = config.model_dump(mode="json", exclude=NOT_LOCKED)
    for key in ("uri", "most_images"):
        whole["output"].pop(key)
    whole["engine"].pop("allow_class_change")
    whole["model"].pop("device")
    whole["model"].pop("compile_cache", None)
    whole["model"]["channels_last"] = _LAYOUTS[config.model.channels_last]
    # As locks have it that are older than these keys.
    if config.prompts.syntax == "plain":
        whole["prompts"].pop("syntax")
    if not config.engine.fuse_loras:
        whole["engine"].pop("fuse_loras")
    for key in ECONOMY.keys() - economy_of(dict(config.sampler)).keys():
        whole["sampler"].pop(key)
    for key in ECONOMY.keys() & whole["parameters"].keys():
        if not whole["parameters"][key]:
            whole["parameters"].pop(key)
    return whole


def config_of(
    segment: Segment, output_uri: str, current: GenerateConfig | None = None
) -> ResolvedConfig:
    """A segment's configuration again; how it runs is taken from `current`."""
    values = json.loads(json.dumps(segment.job))
    values["output"]["uri"] = output_uri
    if values["model"]["channels_last"] is True:
        values["model"]["channels_last"] = "auto"
    if current is not None:
        values["workers"] = current.workers.model_dump()
        values["engine"]["allow_class_change"] = current.engine.allow_class_change
        values["model"]["device"] = current.model.device
        values["model"]["compile_cache"] = current.model.compile_cache
    return ResolvedConfig.model_validate(values)


def config_again(uri: str, lock: Lock, number: int) -> ResolvedConfig:
    """A segment's job, to be run again with such workers as it had."""
    config, was = config_of(lock.segments[number], uri), lock.determinism
    num_gpus = 1.0 if "CUDA" in str(was.get("device")) else 0.0
    workers = {"num_cpus": was.get("threads", 1), "num_gpus": num_gpus}
    return config.model_copy(update={"workers": config.workers.model_copy(update=workers)})


def open_spec(config: GenerateConfig, segment: Segment, number: int) -> Spec:
    """The records of a segment, from the snapshots stored with the data set."""
    uri = config.output.uri
    names = ImageNames(names_uri(uri, number)) if segment.init_sha256 is not None else ()
    rows = Snapshot(snapshot_uri(uri, number))
    return Spec(config, rows, names, segment.first_prompt, segment.first_seed)


def record_of(spec: Spec, segment: Segment, number: int) -> Record:
    """Record `number` of the data set, which is one of that segment's."""
    return replace(spec.record(number - segment.first_record), number=number)


def record_schema(config: GenerateConfig, rows: Any) -> pa.Schema:
    """The columns of a job's records."""
    scores = scores_asked(dict(config.quality))
    optional = optional_columns(config, rows)
    return schema(rows.passed_through, scores, optional, stored_columns(config))


def data_set_schema(uri: str, lock: Lock) -> pa.Schema:
    """The columns of all segments together; those that a segment lacks are null there."""
    schemas = [
        record_schema(config_of(segment, uri), Snapshot(snapshot_uri(uri, number)))
        for number, segment in enumerate(lock.segments)
    ]
    try:
        whole = pa.unify_schemas(schemas)
    except pa.ArrowException as error:
        raise BadInput(f"{uri}: its segments' columns do not go together: {error}") from None
    scores = _scores(lock)
    return schema(passed_through(whole, lock), scores, whole.names, pictures(whole)[1:])


def passed_through(whole: pa.Schema, lock: Lock) -> list[pa.Field]:
    """The records' columns that come from prompt files."""
    own = {*COLUMNS, *OPTIONAL, *pictures(whole), *(SCORES[score][0] for score in _scores(lock))}
    return [field for field in whole if field.name not in own]


def _scores(lock: Lock) -> list[str]:
    """Those of every segment; by their keys, since a prompt file may have a column `caption`."""
    return scores_asked(lock.segments[-1].job.get("quality", {}))
