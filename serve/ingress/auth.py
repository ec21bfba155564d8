"""API keys, and the limits of each.

Owns authentication and rate limits. Knows nothing of what is requested.
"""

import contextlib
import hashlib
import hmac
import time
from collections import Counter
from collections.abc import Generator

from serve.config import AuthConfig, KeyConfig
from serve.errors import ApiError
from serve.file import is_loopback

MINUTE_S = 60.0


class ApiKeys:
    """Checks keys, and enforces their limits within this ingress replica."""

    def __init__(self, config: AuthConfig):
        self.config = config
        self._keys = [(_digest(key), key) for key in config.keys]
        self._active: Counter[str] = Counter()
        self._buckets: dict[str, tuple[float, float]] = {}

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

    @contextlib.contextmanager
    def count_request(self, who: KeyConfig | str) -> Generator[None]:
        """A request counts while in this context, which starts before its body is read.

        Raises ApiError 429 where the key already has its maximum.
        """
        if not isinstance(who, KeyConfig):
            yield
            return
        if self._active[who.name] >= who.max_concurrent:
            message = f"{who.max_concurrent} requests of this key are already in progress"
            raise ApiError(429, message, retry_after_s=1.0)
        self._active[who.name] += 1
        try:
            yield
        finally:
            self._active[who.name] -= 1

    def take_images(self, key: KeyConfig | str, images: int) -> None:
        """Take images from a key's token bucket, which refills in a minute. Raises ApiError 429."""
        if not isinstance(key, KeyConfig) or key.images_per_minute is None:
            return
        rate = key.images_per_minute / MINUTE_S
        now_s = time.monotonic()
        left, since_s = self._buckets.get(key.name, (key.images_per_minute, now_s))
        left = min(key.images_per_minute, left + rate * (now_s - since_s))
        # A request larger than the bucket takes all of it; otherwise it could never be served.
        wanted = min(float(images), key.images_per_minute)
        if left < wanted:
            self._buckets[key.name] = (left, now_s)
            message = f"this key may have {key.images_per_minute:g} images a minute"
            raise ApiError(429, message, retry_after_s=(wanted - left) / rate)
        self._buckets[key.name] = (left - wanted, now_s)


def _digest(key: KeyConfig) -> bytes:
    if key.sha256 is not None:
        return bytes.fromhex(key.sha256)
    return hashlib.sha256(str(key.key).encode()).digest()
