"""Errors of checks, told with the key of the configuration that is to be changed.

Knows nothing of what is checked.
"""

from collections.abc import Callable
from typing import TypeVar

from rayjobs import storage
from rayjobs.config import BadInput

T = TypeVar("T")


def named(key: str, check: Callable[[], T]) -> T:
    """The check's result; an error names the key that is to be changed."""
    try:
        return check()
    except (BadInput, storage.StorageError):
        raise
    except (ValueError, ImportError) as error:
        raise BadInput(f"{key}: {error}") from None
