"""A generation job's entrance: what its configuration names is looked up here, once.

Owns `ResolvedConfig`, and what a DreamBooth export's URI in place of a model's stands for. Nothing
further in looks for exports or makes paths absolute again.
"""

from pathlib import Path
from typing import Any

from rayjobs import storage
from rayjobs.config import BadInput
from rayjobs.generation.config import GenerateConfig, LoraConfig, ModelConfig, WordConfig
from rayjobs.models import exported
from rayjobs.models.exported import Exported


class ResolvedConfig(GenerateConfig):
    """A job that a worker in any working directory reads alike.

    Local paths are absolute, and an export is its base model with adapters and words.
    """


def resolve(config: GenerateConfig) -> ResolvedConfig:
    """Raises BadInput when an export's base model is not to be had."""
    values = config.model_copy(update={"model": _resolve_export(config.model)}).model_dump()
    parts = [values["output"], values["prompts"], values["init"]]
    parts += [part for key in ("loras", "words") for part in values["model"][key]]
    for part in parts:
        if part["uri"] is not None:
            part["uri"] = storage.absolute(part["uri"])
    values["model"]["uri"] = storage.absolute_if_path(values["model"]["uri"])
    return ResolvedConfig.model_validate(values)


def model_name(uri: str) -> str:
    """The model's name in records, the same wherever a local copy of it lies."""
    return Path(uri).name if Path(uri).exists() else uri


def _resolve_export(model: ModelConfig) -> ModelConfig:
    """The base model with the adapter and words of an export; a full export is a model as it is."""
    uri = model.uri
    if not (storage.is_remote(uri) or Path(uri).is_dir()):
        return model
    note = exported.read(uri)
    if note is None:
        return model
    changes: dict[str, Any] = {"words": (*_learned_words(note, uri), *model.words)}
    if note.kind != "full":
        changes["uri"] = _base_of(note, uri)
    if note.kind == "lora":
        adapter = LoraConfig(uri=storage.join(uri, exported.LORA_FILE))
        changes["loras"] = (adapter, *model.loras)
    return model.model_copy(update=changes)


def _base_of(note: Exported, uri: str) -> str:
    base = note.base_uri
    if base.startswith("/") and not Path(base).exists():
        raise BadInput(
            f"model.uri: {uri} is an adapter for the model {base}, which is not here; give that "
            "model as model.uri and this export under model.loras"
        )
    return base


def _learned_words(note: Exported, uri: str) -> tuple[WordConfig, ...]:
    file = storage.join(uri, exported.EMBEDDINGS_FILE)
    return tuple(WordConfig(uri=file, word=word) for word in note.tokens)
