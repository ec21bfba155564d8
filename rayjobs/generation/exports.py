"""A model's learned words: the identity that they give it, and how it is taught them.

Knows nothing of jobs.
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
from rayjobs.generation.config import ModelConfig, WordConfig
from rayjobs.models import exported

if TYPE_CHECKING:
    from rayjobs.diffusion.model import Model


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


def _local(config: WordConfig) -> Path:
    path = storage.fetch(config.uri)
    file = path / exported.EMBEDDINGS_FILE if path.is_dir() else path
    if not file.is_file():
        raise BadInput(f"model.words: {config.uri} holds no {exported.EMBEDDINGS_FILE}")
    return file
