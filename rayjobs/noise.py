"""What Ray's C++ part says on a driver's standard error while it starts.

Owns which of it is heard. Failures reach the driver as exceptions; what the nodes' processes log is
in Ray's session folder, at their own level.
"""

import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from ray._private import worker as ray_worker

LEVEL = "RAY_BACKEND_LOG_LEVEL"
ECHO = b"Set ray log level from environment variable"
"""The line with which Ray answers that variable, whatever the level is."""


@contextmanager
def quiet() -> Generator[None]:
    """A context in which `ray.init` gives this process, and none that it starts, the level fatal.

    Whoever has set the level already hears all of it.
    """
    if LEVEL in os.environ:
        yield
        return
    connect = ray_worker.connect

    def connect_quietly(*args: Any, **kwargs: Any) -> Any:
        os.environ[LEVEL] = "fatal"
        try:
            with _without(ECHO):
                return connect(*args, **kwargs)
        finally:
            del os.environ[LEVEL]

    ray_worker.connect = connect_quietly
    try:
        yield
    finally:
        ray_worker.connect = connect


@contextmanager
def _without(text: bytes) -> Generator[None]:
    """Leave out lines with `text` of what is written to this process's standard error."""
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            for line in file:
                if text not in line:
                    os.write(2, line)
