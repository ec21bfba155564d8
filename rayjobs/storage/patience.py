"""Errors of file systems in words that say what to do, and patience with a server that is away.

Owns which errors may pass. Knows no file system.
"""

import contextlib
import errno
import logging
import time
from collections.abc import Callable, Generator
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

from rayjobs.storage.places import is_remote
from rayjobs.storage.s3 import HOW_TO_ALLOW, NotThere, StorageError, Unavailable

LONGEST_WAIT_S = 15.0
S3_INTERNAL = getattr(errno, "EREMOTEIO", errno.EIO)
"""What s3fs makes of a 500: the server asks for another try."""
AWAY = (
    *(errno.EIO, errno.EBUSY, errno.ETIMEDOUT, errno.ECONNREFUSED, errno.ECONNRESET),
    S3_INTERNAL,
)
num_retries = 0
"""How often a call of this process was made again."""
_patience_s = 0.0

P = ParamSpec("P")
T = TypeVar("T")


def be_patient(seconds: float) -> None:
    """From now on every call of this process waits this long for a server that is away."""
    global _patience_s
    _patience_s = seconds


def patient(call: Callable[Concatenate[str, P], T]) -> Callable[Concatenate[str, P], T]:
    """The call, made again with growing pauses while the storage is Unavailable."""

    @wraps(call)
    def wait_for(uri: str, /, *args: P.args, **kwargs: P.kwargs) -> T:
        deadline, wait_s = time.monotonic() + _patience_s, 0.5
        while True:
            try:
                return call(uri, *args, **kwargs)
            except Unavailable as error:
                if time.monotonic() + wait_s > deadline:
                    raise
                logging.getLogger("rayjobs").warning("%s; waiting for it", error)
            global num_retries
            num_retries += 1
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)

    return wait_for


@contextlib.contextmanager
def translate_errors(uri: str) -> Generator[None]:
    """Turn a file system's error into one that says what to do."""
    try:
        yield
    except (StorageError, FileExistsError):
        raise
    except FileNotFoundError as error:
        raise NotThere(f"{uri}: no such file, folder or bucket") from error
    except PermissionError as error:
        way_out = HOW_TO_ALLOW if is_remote(uri) else "change its owner or mode, or use another"
        raise StorageError(f"{uri}: access denied; {way_out}") from error
    except OSError as error:
        if is_remote(uri) and error.errno in AWAY:
            raise Unavailable(f"{uri}: {error}") from error
        raise StorageError(f"{uri}: {error.strerror or error}") from error
    except Exception as error:
        if type(error).__module__.startswith(("botocore", "aiobotocore", "aiohttp")):
            raise Unavailable(f"{uri}: {error}") from error
        raise
