"""A model from a configuration: fetched, loaded, and taught its words.

The one place where the keys of `rayjobs.models.options` become the engine's ModelOptions.
"""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from rayjobs.diffusion.model import Model, ModelOptions, load_model
from rayjobs.diffusion.text.inversion import load_word
from rayjobs.models.exports import identity, words_file
from rayjobs.models.facts import to_source
from rayjobs.models.options import LoadOptions, ModelConfig, SourceConfig, WordConfig


def load(config: ModelConfig, *, alone: bool = True) -> Model:
    """The model of a configuration. Adapters are for the engine to load; see `load_weights`."""
    return teach(load_weights(config, config, alone=alone), config.words)


def load_weights(
    source: SourceConfig | str,
    options: LoadOptions,
    *,
    alone: bool = True,
    onednn: bool = True,
) -> Model:
    """The model of a source or uri, fetched to this machine first when it is elsewhere.

    `alone` and `onednn` are those of `rayjobs.diffusion.model`. Raises ValueError and StorageError.
    """
    names = LoadOptions.model_fields.keys() & {each.name for each in fields(ModelOptions)}
    keys: dict[str, Any] = {name: getattr(options, name) for name in names}
    return load_model(to_source(source), ModelOptions(**keys, onednn=onednn), alone=alone)


def teach(model: Model, words: Sequence[WordConfig]) -> Model:
    """The model with learned words and the identity that they give it.

    Its text encoders and tokenizers are changed in place.
    """
    for each in words:
        load_word(model, str(words_file(each)), each.word)
    return replace(model, sha256=identity(model.sha256, words))
