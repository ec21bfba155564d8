"""An engine made ready for its requests: what its model is to have compiled is compiled, once.

Owns where compiled code is kept for the processes after this one, which then start sooner. Which
graphs there are is the engine's to know.
"""

import logging
from collections.abc import Sequence

from rayjobs import storage
from rayjobs.diffusion.engine import Engine
from rayjobs.diffusion.modules import artifacts
from rayjobs.storage import NotThere

OWN_SIZE = ((None, None),)


def warm(
    engine: Engine,
    cache_uri: str | None = None,
    sizes: Sequence[tuple[int | None, int | None]] = OWN_SIZE,
) -> None:
    """Compile for pictures of these sizes, from what is kept in a folder (None: this machine's).

    Without `model.compile` nothing is to be done. A storage that is away costs only time.
    """
    if engine.model.compiled is None:
        return
    folder = str(storage.cache_folder() / "compiled") if cache_uri is None else cache_uri
    place = storage.join(folder, f"{artifacts.identify(engine.model, sizes)}.bin")
    is_kept = _take(place)
    engine.warm(sizes)
    if not is_kept:
        _keep(place)


def _take(place: str) -> bool:
    try:
        artifacts.take(storage.read_bytes(place))
    except NotThere:
        return False
    except (OSError, RuntimeError) as error:
        _logger().warning("%s, what was compiled before, is not used: %s", place, error)
        return False
    return True


def _keep(place: str) -> None:
    made = artifacts.give()
    if made is None:
        return
    try:
        storage.write_bytes(place, made)
    except OSError as error:
        _logger().warning("%s, what was compiled, is not kept: %s", place, error)


def _logger() -> logging.Logger:
    return logging.getLogger("rayjobs")
