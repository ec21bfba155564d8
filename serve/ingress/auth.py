"""API keys, and what a caller over its limits is told.

Owns authentication. Knows nothing of what is requested, nor where limits are counted.
"""

import hashlib
import hmac
from collections.abc import Callable
from functools import partial

from serve.config import AuthConfig, KeyConfig
from serve.errors import ApiError
from serve.file import is_loopback
from serve.limits.keeper import Limits


class ApiKeys:
    """Checks keys, and enforces their limits."""

    def __init__(self, config: AuthConfig, limits: Limits):
        self.config = config
        self.limits = limits
        self._keys = [(_digest(key), key) for key in config.keys]

    def identify(self, authorization: str | None, host: str | None) -> KeyConfig | str:
        """The key sent, or the address where none is needed. Raises ApiError 401 or 403."""
        if not self._keys:
            if self.config.allow_anyone or is_loopback(host):
                return host or "unknown"
            raise ApiError(
                403, "this server has no API keys, so it answers requests from its own machine only"
            )
        kind, _, sent = (authorization or "").partition(" ")
        if kind.lower() != "bearer" or not sent.strip():
            raise ApiError(401, "no API key; send it as 'Authorization: Bearer KEY'")
        digest = hashlib.sha256(sent.strip().encode()).digest()
        # All keys are compared, each in constant time, so that timing reveals nothing.
        matches = [key for known, key in self._keys if hmac.compare_digest(known, digest)]
        if not matches:
            raise ApiError(401, "the API key is not valid")
        return matches[0]

    async def enter(self, who: KeyConfig | str) -> Callable[[], None]:
        """Count a request from before its body is read until the function returned is called.

        Raises ApiError 429 where the key already has its maximum.
        """
        if not isinstance(who, KeyConfig):
            return _nothing
        if not await self.limits.enter(who):
            message = f"{who.max_concurrent} requests of this key are already in progress"
            raise ApiError(429, message, retry_after_s=1.0)
        return partial(self.limits.leave, who)

    async def take_images(self, key: KeyConfig | str, images: int) -> None:
        """Take images of what a key has in a minute. Raises ApiError 429."""
        wait_s = await self.limits.take(key, images) if isinstance(key, KeyConfig) else 0.0
        if isinstance(key, KeyConfig) and wait_s:
            message = f"this key may have {key.images_per_minute:g} images a minute"
            raise ApiError(429, message, retry_after_s=wait_s)


def _nothing() -> None:
    pass


def _digest(key: KeyConfig) -> bytes:
    if key.sha256 is not None:
        return bytes.fromhex(key.sha256)
    return hashlib.sha256(str(key.key).encode()).digest()
