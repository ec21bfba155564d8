"""Which web pages may use a server that has no keys.

Owns that question. A browser on a machine that may use the API sends what any page makes it send,
and a page on a name that its owner lets point here (DNS rebinding) reads the answers too: without
keys the caller's address proves nothing about the page. Knows no route but those that are read
only; with keys there is nothing to guard, because no page has them.
"""

import ipaddress
from contextlib import suppress
from fnmatch import fnmatch
from urllib.parse import urlsplit

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.config import AuthConfig
from serve.errors import ApiError

GUARDED = ("/v1/", "/metrics")
"""What no foreign page may even GET; a link to the page itself may stand anywhere."""


class PageGuard:
    """Refuses requests by names that are not this server's, and those of foreign pages."""

    def __init__(self, app: ASGIApp, config: AuthConfig):
        self.app = app
        self.config = config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self.config.keys:
            try:
                self.check(scope["method"], scope["path"], Headers(scope=scope))
            except ApiError as error:
                refusal = JSONResponse(error.body, error.status, error.headers)
                await refusal(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def check(self, method: str, path: str, headers: Headers) -> None:
        """Raise ApiError 403 for a request that a foreign page may have made."""
        host = headers.get("host", "")
        if host and not self._is_own(host):
            message = f"{host!r} is no name of this server; see auth.hosts"
            raise ApiError(403, message, code="host_not_allowed")
        is_read = method in ("GET", "HEAD") and not path.startswith(GUARDED)
        if not is_read and self._is_foreign(headers, host):
            message = "another web page may not use this server; see auth.origins, or set keys"
            raise ApiError(403, message, code="origin_not_allowed")

    def _is_own(self, host: str) -> bool:
        """Whether no stranger can have let this name point here."""
        with suppress(ValueError):
            name = urlsplit(f"//{host}").hostname or ""
            with suppress(ValueError):
                return bool(ipaddress.ip_address(name))
            is_local = "." not in name or name.endswith(".localhost")
            return is_local or any(fnmatch(name, known.lower()) for known in self.config.hosts)
        return False

    def _is_foreign(self, headers: Headers, host: str) -> bool:
        """Whether a page of another origin sends this; programs send neither header."""
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        if origin in self.config.origins or site == "same-origin":
            return False
        if origin is None:
            return site in ("cross-site", "same-site")
        with suppress(ValueError):
            return urlsplit(origin).netloc.lower() != host.lower()
        return True
