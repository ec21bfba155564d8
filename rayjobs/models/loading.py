"""A model from a configuration: fetched, loaded, and taught its words.

The one place where the keys of `rayjobs.models.options` become the engine's ModelOptions.
"""

from collections.abc import Sequence
from dataclasses import replace

from rayjobs import storage
from rayjobs.diffusion.model import Model, ModelOptions, load_model
from rayjobs.diffusion.text.inversion import load_word
from rayjobs.models.exports import identity, words_file
from rayjobs.models.options import LoadOptions, ModelConfig, WordConfig


def load(config: ModelConfig, *, alone: bool = True) -> Model:
    """The model of a configuration. Adapters are for the engine to load; see `load_weights`."""
    return teach(load_weights(config.uri, config, config.config, alone=alone), config.words)


def load_weights(
    uri: str,
    options: LoadOptions,
    config: str | None = None,
    *,
    alone: bool = True,
    onednn: bool = True,
) -> Model:
    """The model at `uri`, fetched to this machine first when it is elsewhere.

    `config`, `alone` and `onednn` are those of `rayjobs.diffusion.model`. Raises ValueError and
    StorageError.
    """
    keys = {name: getattr(options, name) for name in LoadOptions.model_fields}
    parts = None if config is None else storage.to_local(config)
    held = ModelOptions(**keys, onednn=onednn)
    return load_model(storage.to_local(uri), held, config=parts, alone=alone)


def teach(model: Model, words: Sequence[WordConfig]) -> Model:
    """The model with learned words and the identity that they give it.

    Its text encoders and tokenizers are changed in place.
    """
    for each in words:
        load_word(model, str(words_file(each)), each.word)
    return replace(model, sha256=identity(model.sha256, words))
