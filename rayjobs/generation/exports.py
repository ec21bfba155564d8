"""A DreamBooth export's URI in place of a model's: what it stands for.

Owns the step from the note beside exported weights to the keys of a generation job.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rayjobs import storage
from rayjobs.config import BadInput
from rayjobs.dataset.records import canonical_json
from rayjobs.diffusion.weights import sha256_of
from rayjobs.generation.config import GenerateConfig, LoraConfig, ModelConfig, WordConfig
from rayjobs.models import exported

if TYPE_CHECKING:
    from rayjobs.diffusion.model import Model
    from rayjobs.models.exported import Exported


def resolve(config: GenerateConfig) -> GenerateConfig:
    """The job with the base model and the adapter that an export's URI means.

    A full export is a model as it is. Raises BadInput when the export's base is not to be had.
    """
    uri = config.model.uri
    if not (storage.is_remote(uri) or Path(uri).is_dir()):
        return config
    note = exported.read(uri)
    if note is None:
        return config
    if note.kind == "full":
        return _with_words(config, note, uri, uri)
    base = note.base_uri
    if base.startswith("/") and not Path(base).exists():
        raise BadInput(
            f"model.uri: {uri} is an adapter for the model {base}, which is not here; give that "
            "model as model.uri and this export under model.loras"
        )
    if note.kind == "lora":
        loras = (LoraConfig(uri=storage.join(uri, exported.LORA_FILE)), *config.model.loras)
        model = config.model.model_copy(update={"loras": loras})
        config = config.model_copy(update={"model": model})
    return _with_words(config, note, uri, base)


def identity(model_sha256: str, config: ModelConfig) -> str:
    """A model's identity with the words that it is taught."""
    if not config.words:
        return model_sha256
    taught = [(each.word, sha256_of(_local(each))) for each in config.words]
    return hashlib.sha256(canonical_json([model_sha256, *taught])).hexdigest()


def teach(model: Model, config: ModelConfig) -> Model:
    """The model with its words and the identity that they give it."""
    from rayjobs.diffusion.text.inversion import load_word

    for each in config.words:
        load_word(model, str(_local(each)), each.word)
    return replace(model, sha256=identity(model.sha256, config))


def _with_words(config: GenerateConfig, note: Exported, uri: str, base: str) -> GenerateConfig:
    learned = storage.join(uri, exported.EMBEDDINGS_FILE)
    mine = tuple(WordConfig(uri=learned, word=word) for word in note.tokens)
    model = config.model.model_copy(update={"uri": base, "words": (*mine, *config.model.words)})
    return config.model_copy(update={"model": model})


def _local(config: WordConfig) -> Path:
    path = storage.fetch(config.uri)
    file = path / exported.EMBEDDINGS_FILE if path.is_dir() else path
    if not file.is_file():
        raise BadInput(f"model.words: {config.uri} holds no {exported.EMBEDDINGS_FILE}")
    return file
