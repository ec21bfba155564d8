"""A generation job's entrance: what its configuration names is looked up here, once.

Owns `ResolvedConfig`. Nothing further in looks for exports or makes paths absolute again.
"""

from pathlib import Path

from rayjobs import storage
from rayjobs.generation.config import GenerateConfig
from rayjobs.models import exports
from rayjobs.quality import kinds


class ResolvedConfig(GenerateConfig):
    """A job that a worker in any working directory reads alike.

    Local paths are absolute, and an export is its base model with adapters and words.
    """


def resolve(config: GenerateConfig) -> ResolvedConfig:
    """Raises BadInput when an export's base model is not to be had."""
    values = config.model_copy(update={"model": exports.resolve(config.model)}).model_dump()
    parts = [values["output"], values["prompts"], values["init"]]
    parts += [part for key in ("loras", "words") for part in values["model"][key]]
    for part in parts:
        if part["uri"] is not None:
            part["uri"] = storage.absolute(part["uri"])
    named = [(values["model"], key) for key in ("uri", "config", "base")]
    named += [(values["quality"], key) for key in kinds.MODELS]
    named += [(control, key) for control in values.get("controls", ()) for key in ("uri", "image")]
    named += [(each, "model") for each in values.get("passes", ())]
    keys = ("uri", "encoder", "image")
    named += [(each, key) for each in values.get("ip_adapters", ()) for key in keys]
    for part, key in named:  # a path, or a name that a hub or the package knows
        if part.get(key) is not None:
            part[key] = storage.absolute_if_path(part[key])
    return ResolvedConfig.model_validate(values)


def model_name(uri: str) -> str:
    """The model's name in records, the same wherever a local copy of it lies."""
    return Path(uri).name if Path(uri).exists() else uri
