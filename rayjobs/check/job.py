"""A configuration before it is run: its storage, model, prompts, memory and room.

Owns the order of the questions. What a job itself asks before it works, such as a plan's, is asked
of the job's own code.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

from rayjobs import storage
from rayjobs.check import footprint, model, nodes
from rayjobs.check.nodes import NodeType
from rayjobs.check.report import Report
from rayjobs.config import Config, Workers
from rayjobs.models import exports
from rayjobs.models.options import ModelConfig, SourceConfig
from rayjobs.storage import StorageError

OUTPUTS = ("output.uri", "results.uri")
MADE_LATER = ("registry.uri", "prior.uri", "class_uri")
"""Places where nothing has to be yet."""


def check(kind: str, config: Any, report: Report, cluster: Sequence[NodeType] = ()) -> None:
    """Look at everything that a job of this kind reads, writes and asks for."""
    before = len(report.findings)
    _check_places(config, report)
    models = [each for each in _models(config) if _is_there(each, report)]
    with ExitStack() as kept:
        seen = []
        for each in models:
            with report.catching(_key_of(each, config)):
                weights = kept.enter_context(model.found(_base(each)))
                seen.append((each, weights))
                _tell_of(each, weights, report)
        if len(report.findings) == before:
            _check_work(kind, config, report)
        if len(seen) == len(models):
            footprint.check(kind, config, seen, report, cluster)
    if cluster:
        for key, workers, count in _groups(kind, config):
            report.find(nodes.lack_of(workers, count, cluster, key))


def _check_places(config: Config, report: Report) -> None:
    for key, uri in _uris(config.model_dump()):
        if key.endswith(MADE_LATER) or key.startswith(("model.uri", "models", "before.uri")):
            continue
        if key == "safety.uri" and model.is_hub_id(uri):
            continue
        with report.catching(f"{key}: "):
            if _reached(uri, report, write=key in OUTPUTS) and key not in OUTPUTS:
                _check_there(uri)


def _check_there(uri: str) -> None:
    if not storage.exists(uri) and not storage.is_folder(uri):
        raise StorageError(f"{uri}: nothing is there")


def _reached(uri: str, report: Report, write: bool = False) -> bool:
    """Whether the storage of `uri` answers; raises StorageError the first time that it does not."""
    place = "/".join(uri.split("/")[:3]) if storage.is_remote(uri) else uri
    asked = f"{place} {write}"
    if asked not in report.places:
        report.places[asked] = None
        try:
            storage.check(uri, write=write)
        except StorageError as error:
            report.places[asked] = str(error)
            if report.places.get(f"{place} {not write}") is None:
                raise
    return report.places[asked] is None


def _key_of(model_config: Any, config: Any) -> str:
    """Of a serving file the model's name; of others what a loader names itself."""
    return f"models {model_config.name}: " if hasattr(config, "models") else ""


def _is_there(config: SourceConfig, report: Report) -> bool:
    if not storage.is_remote(config.uri):
        return True
    with report.catching("model.uri: "):
        return _reached(config.uri, report)
    return False


def _uris(values: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every place that a configuration names, by its dotted key."""
    if isinstance(values, dict):
        for name, value in values.items():
            inner = f"{key}.{name}".lstrip(".")
            if name.endswith("uri") and isinstance(value, str) and value != "starter":
                yield inner, value
            else:
                yield from _uris(value, inner)
    elif isinstance(values, list | tuple):
        for number, value in enumerate(values):
            yield from _uris(value, f"{key}[{number}]")


def _models(config: Any) -> list[SourceConfig]:
    """The models that are loaded at the start."""
    if hasattr(config, "models"):
        return [each for each in config.models if each.preload]
    before = getattr(config, "before", None)
    return [config.model] if before is None else [config.model, before]


def _base(config: SourceConfig) -> SourceConfig:
    """Of an export, the model that it is for."""
    keys = {name: getattr(config, name) for name in SourceConfig.model_fields}
    found = exports.resolve(ModelConfig(**keys))
    return SourceConfig(**{name: getattr(found, name) for name in SourceConfig.model_fields})


def _tell_of(config: SourceConfig, weights: Any, report: Report) -> None:
    if weights is None:
        is_loose = model.is_hub_id(config.uri) and config.revision is None
        pinned = "" if not is_loose else "; give model.revision, so that it stays the same"
        where = config.uri if model.is_hub_id(config.uri) else f"{config.uri} or its base"
        told = f"{where} is not on this machine; taken to be as large as SDXL"
        report.tell(f"not looked at: {told}{pinned}")
        return
    count = sum(model.num_parameters(weights).values())
    report.tell(f"model {config.uri}: {weights.family}, {count / 1e6:,.0f} M parameters")


def _check_work(kind: str, config: Any, report: Report) -> None:
    """What the job itself would ask, where that fetches no model."""
    with report.catching():
        if kind == "generate":
            from rayjobs.generation.spec import plan

            made = plan.plan(config)
            report.tell(f"{made.num_records:,} records in {made.num_shards:,} shards")
        elif kind == "dreambooth":
            from rayjobs.dreambooth.data import photos

            found = photos.find_photos(config.instance.uri, config.instance.prompt)
            report.tell(f"{len(found):,} photographs")
        elif kind == "evaluate":
            from rayjobs.dreambooth.config.evaluate import read_prompts

            report.tell(f"{len(read_prompts(config)):,} prompts")


def _groups(kind: str, config: Any) -> Iterator[tuple[str, Workers, int]]:
    """The workers that must have room, by their key, and how many at once."""
    if kind == "serve":
        scaling = config.scaling
        keys = {"num_gpus": scaling.num_gpus, "num_cpus": max(scaling.num_cpus, 0.1)}
        yield "scaling", Workers(**keys), max(1, scaling.min)
        return
    yield "workers", config.workers, config.workers.min
    if kind == "dreambooth" and config.validation.num_gpus:
        more = {"num_gpus": config.validation.num_gpus, "num_cpus": config.validation.num_cpus}
        yield "validation", Workers(**more), 1
