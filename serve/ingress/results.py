"""Finished images on storage, for `response_format: url`.

Owns the threads that wait for that storage, which nothing else waits for, and whether it answers.
A storage that is away is told of before an image is made. Knows neither HTTP nor the engine.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rayjobs import storage
from rayjobs.storage import StorageError
from serve.config import ResultsConfig
from serve.errors import ApiError

WRITERS = 16
WRITE_S = 30.0
"""A write that takes longer has failed: its caller waits."""
CHECK_EVERY_S = 10.0
"""Time between two looks whether a storage that was away is back."""


class ResultsStore:
    """Stores images and links to them. Used on one event loop."""

    def __init__(self, config: ResultsConfig):
        self.config = config
        self._writers = ThreadPoolExecutor(WRITERS, thread_name_prefix="results")
        self._checker = ThreadPoolExecutor(1, thread_name_prefix="results-check")
        self._is_away = False
        self._checked_s = 0.0
        # At once: the first use of an S3 client takes a second of Python, which others would feel.
        self._check = None if config.uri is None else self._checker.submit(self._look)

    async def require(self) -> None:
        """Raise ApiError 503 where an image could not be stored now; asked before it is made."""
        if not self._checked_s and self._check is not None:
            await asyncio.shield(asyncio.wrap_future(self._check))
        if self._is_away:
            self._check_again()
            raise _away()

    async def put(self, data: bytes, extension: str) -> str:
        """A link to a stored image. Raises ApiError 503."""
        try:
            async with asyncio.timeout(WRITE_S) as timer:
                return str(await _in(self._writers, self._write, data, extension))
        except asyncio.CancelledError:  # its caller's deadline may be short, or it has left
            self._check_again()
            raise
        except (TimeoutError, StorageError) as error:
            if isinstance(error, TimeoutError) and not timer.expired():
                raise
            self._went_away(error)
            raise _away() from error

    def _write(self, data: bytes, extension: str) -> str:
        day = time.strftime("%Y-%m-%d", time.gmtime())
        uri = storage.join(str(self.config.uri), day, f"{uuid.uuid4().hex}.{extension}")
        storage.write_bytes(uri, data)
        return storage.link(uri, self.config.expires_s)

    def _check_again(self) -> None:
        is_due = time.monotonic() - self._checked_s > CHECK_EVERY_S
        if is_due and (self._check is None or self._check.done()):
            self._check = self._checker.submit(self._look)

    def _look(self) -> None:
        uri = str(self.config.uri)
        try:
            storage.check(uri, write=True)
            storage.link(storage.join(uri, "x"), self.config.expires_s)
            self._is_away, self._checked_s = False, time.monotonic()
        except StorageError as error:
            self._went_away(error)

    def _went_away(self, error: Exception) -> None:
        if not self._is_away:
            reason = str(error) or f"no answer in {WRITE_S:g} s"
            logging.getLogger("rayjobs").warning("results.uri cannot be written: %s", reason)
        self._is_away, self._checked_s = True, time.monotonic()


def _away() -> ApiError:
    message = "images cannot be stored at the moment; use response_format b64_json, or try later"
    code = "storage_unavailable"
    param = "response_format"
    return ApiError(503, message, param=param, code=code, retry_after_s=CHECK_EVERY_S)


async def _in(pool: ThreadPoolExecutor, work: Callable[..., Any], *args: Any) -> Any:
    return await asyncio.get_running_loop().run_in_executor(pool, work, *args)
