"""Request ids, and request bodies: limited in size, parsed as JSON or as a form.

Owns those limits and the errors for bodies that cannot be read. Knows no route. Starlette's own
`max_body_size` is not used: where a Content-Length is too large, it replaces every response by a
plain text 413, even a 401, and clients of the API expect OpenAI's JSON errors.
"""

import json
import re
import time
import uuid
from typing import Any

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.errors import ApiError

MAX_FORM_FIELDS = 64
MAX_JSON_BYTES = 2**20
REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


class RequestLimitsMiddleware:
    """Gives every request an id, limits its body, and hides the prefix of the application."""

    def __init__(self, app: ASGIApp, max_bytes: int, adds_ids: bool):
        self.app = app
        self.max_bytes = max_bytes
        self.adds_ids = adds_ids

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        sent = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = sent if REQUEST_ID.fullmatch(sent) else f"req_{uuid.uuid4().hex}"
        # Applications that share a host have whole paths in their routes.
        scope = {**scope, "root_path": ""}
        scope.setdefault("state", {})
        scope["state"] = {**scope["state"], "request_id": request_id}
        received, started_s = 0, time.monotonic()

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_bytes:
                raise ApiError(413, f"the request is larger than {self.max_bytes} bytes")
            return message

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                duration_ms = str(round(1000 * (time.monotonic() - started_s))).encode()
                response_headers = [*message["headers"], (b"openai-processing-ms", duration_ms)]
                if self.adds_ids:
                    response_headers.append((b"x-request-id", request_id.encode()))
                message = {**message, "headers": response_headers}
            await send(message)

        await self.app(scope, limited, with_headers)


async def read_json(request: Request) -> Any:
    content_type = request.headers.get("content-type", "application/json").split(";")[0].strip()
    if content_type != "application/json":
        raise ApiError(415, f"the content type is {content_type}; send application/json")
    data = await request.body()
    if len(data) > MAX_JSON_BYTES:
        raise ApiError(413, f"the body has {len(data)} bytes; at most {MAX_JSON_BYTES}")
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not valid JSON") from None


async def read_form(request: Request) -> tuple[dict[str, list[bytes]], dict[str, str]]:
    """The files and the text fields of a multipart form. Raises ApiError."""
    content_type = request.headers.get("content-type", "").split(";")[0].strip()
    if content_type != "multipart/form-data":
        raise ApiError(415, f"the content type is {content_type!r}; send multipart/form-data")
    charset = re.search(r"charset\s*=\s*[\"']?([^;\"']*)", request.headers["content-type"], re.I)
    if charset is not None and charset[1].strip().lower() not in ("utf-8", "utf8"):
        raise ApiError(415, f"the charset is {charset[1]!r}; send UTF-8")
    files: dict[str, list[bytes]] = {}
    values: dict[str, str] = {}
    async with request.form(max_files=20, max_fields=MAX_FORM_FIELDS) as form:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                files.setdefault(name, []).append(await value.read())
            else:
                values[name] = value
    for name in ("image", "image[]", "mask"):
        if name in values:
            raise ApiError(400, f"{name} must be a file.", param=name, code="invalid_value")
    unknown = [name for name in files if name not in ("image", "image[]", "mask")]
    if unknown:
        message = f"Unknown parameter: '{unknown[0]}'."
        raise ApiError(400, message, param=unknown[0], code="unknown_parameter")
    return files, values
