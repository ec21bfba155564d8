"""Errors in OpenAI's format: one JSON shape for every status.

Owns that shape and the status of each failure. Knows nothing of where errors come from.
"""

import math
from random import uniform
from typing import Any

from serve.protocol import Failed

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
}
SPREAD = 1.5
"""How much longer than need be the last of many may be told to wait."""
CODES = {401: "invalid_api_key", 413: "request_too_large", 429: "rate_limit_exceeded"}


class ApiError(Exception):
    """An error response. `param` names the field that caused it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code or CODES.get(status)
        # Spread, so that those who are refused together do not come again together.
        self.retry_after_s = None if retry_after_s is None else retry_after_s * uniform(1, SPREAD)

    @property
    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else TYPES[400])
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    @property
    def headers(self) -> dict[str, str]:
        """Whether and when to retry; OpenAI's clients follow these headers."""
        if self.retry_after_s is not None:
            seconds = max(1, math.ceil(self.retry_after_s))
            milliseconds = max(1, round(1000 * self.retry_after_s))
            return {"retry-after": str(seconds), "retry-after-ms": str(milliseconds)}
        return {} if self.status in (408, 500, 502, 503) else {"x-should-retry": "false"}


def translate_failure(failed: Failed) -> ApiError:
    """The error response for a failure in an engine replica."""
    if failed.kind == "busy":
        return ApiError(429, failed.message, code="overloaded", retry_after_s=failed.retry_after_s)
    if failed.kind == "deadline":
        return ApiError(504, failed.message, param=failed.param, code="deadline_exceeded")
    if failed.kind == "refused":
        return ApiError(400, failed.message, param=failed.param, code="moderation_blocked")
    if failed.kind == "broken":
        return ApiError(500, failed.message, code="engine_failed")
    missing = failed.param == "model" and "does not exist" in failed.message
    if missing:
        return ApiError(404, failed.message, param="model", code="model_not_found")
    return ApiError(400, failed.message, param=failed.param)
