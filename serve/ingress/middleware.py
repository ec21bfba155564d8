"""What every request and every response has: an id, a limited body, headers for browsers.

Owns those. Knows no route and nothing of who asks.
"""

import re
import time
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.ingress.bodies import LimitedBody

REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
SAFE_HEADERS = (
    (b"content-security-policy", b"frame-ancestors 'none'"),
    (b"x-frame-options", b"DENY"),
    (b"x-content-type-options", b"nosniff"),
)
"""No page may show this one in a frame, where a click on it could be another's."""


class RequestMiddleware:
    """Gives every request an id, limits its body, and hides the prefix of the application.

    Whatever answers GET answers HEAD too.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, adds_ids: bool):
        self.app = app
        self.max_bytes = max_bytes
        self.adds_ids = adds_ids

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        sent = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        request_id = sent if REQUEST_ID.fullmatch(sent) else f"req_{uuid.uuid4().hex}"
        is_head, started_s = scope["method"] == "HEAD", time.monotonic()
        # Applications that share a host have whole paths in their routes.
        scope = {**scope, "root_path": "", "method": "GET" if is_head else scope["method"]}
        scope["state"] = {**scope.get("state", {}), "request_id": request_id}

        body = LimitedBody(receive, self.max_bytes)
        is_refused = False

        async def with_headers(message: Message) -> None:
            nonlocal is_refused
            if message["type"] == "http.response.start":
                duration_ms = str(round(1000 * (time.monotonic() - started_s))).encode()
                is_refused = message["status"] >= 400 and scope["method"] == "POST"
                headers = [*message["headers"], *SAFE_HEADERS]
                headers.append((b"openai-processing-ms", duration_ms))
                if self.adds_ids:
                    headers.append((b"x-request-id", request_id.encode()))
                message = {**message, "headers": headers}
            elif is_head and message["type"] == "http.response.body":
                message = {**message, "body": b""}
            is_last = message["type"] == "http.response.body" and not message.get("more_body")
            if is_last and is_refused and not body.is_whole:
                await send({**message, "more_body": True})
                await body.discard()
                message = {"type": "http.response.body", "body": b""}
            await send(message)

        await self.app(scope, body, with_headers)
