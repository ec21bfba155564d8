import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from rayjobs.diffusion.model import Model

_loaded: "dict[str, Model]" = {}


@pytest.fixture(autouse=True)
def loaded_once() -> Iterator[None]:
    """The starter is loaded, and its UNet recorded, by the first job of this process only."""
    loading: Any = sys.modules.get("rayjobs.models.loading")
    if loading is None:
        yield
        return
    load = loading.load

    def load_once(config: Any, *, alone: bool = True) -> "Model":
        if config.uri != "starter" or config.words or getattr(config, "loras", ()):
            return load(config, alone=alone)
        key = f"{config.model_dump_json()} {alone}"
        if key not in _loaded:
            _loaded[key] = load(config, alone=alone)
        return _loaded[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "load", load_once)
        yield
