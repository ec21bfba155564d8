"""What comes with a request: its id, its body within bounds, as JSON or as a form.

Owns those bounds and how a body that cannot be read is told. Knows no route.
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

MOST_FORM_FIELDS = 64
MOST_JSON_BYTES = 2**20
REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


class Envelope:
    """Around every request: an id, a bound on its body, and routes that know no prefix."""

    def __init__(self, app: ASGIApp, most_bytes: int, stamps_ids: bool):
        self.app = app
        self.most_bytes = most_bytes
        self.stamps_ids = stamps_ids

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if REQUEST_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
        # Two applications may share the paths; each has the whole path in its routes.
        scope = {**scope, "root_path": ""}
        scope.setdefault("state", {})
        scope["state"] = {**scope["state"], "request_id": request_id}
        seen, started_s = 0, time.monotonic()

        async def bounded() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.most_bytes:
                raise ApiError(413, f"the request is larger than {self.most_bytes} bytes")
            return message

        async def stamped(message: Message) -> None:
            if message["type"] == "http.response.start":
                took_ms = str(round(1000 * (time.monotonic() - started_s))).encode()
                own = [*message["headers"], (b"openai-processing-ms", took_ms)]
                if self.stamps_ids:
                    own.append((b"x-request-id", request_id.encode()))
                message = {**message, "headers": own}
            await send(message)

        await self.app(scope, bounded, stamped)


async def read_json(request: Request) -> Any:
    declared = request.headers.get("content-type", "application/json").split(";")[0].strip()
    if declared != "application/json":
        raise ApiError(415, f"the content type is {declared}; send application/json")
    data = await request.body()
    if len(data) > MOST_JSON_BYTES:
        raise ApiError(413, f"the body has {len(data)} bytes; at most {MOST_JSON_BYTES}")
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not valid JSON") from None


async def read_form(request: Request) -> tuple[dict[str, list[bytes]], dict[str, str]]:
    """The files and the texts of a multipart form. Raises ApiError."""
    declared = request.headers.get("content-type", "").split(";")[0].strip()
    if declared != "multipart/form-data":
        raise ApiError(415, f"the content type is {declared!r}; send multipart/form-data")
    charset = re.search(r"charset\s*=\s*[\"']?([^;\"']*)", request.headers["content-type"], re.I)
    if charset is not None and charset[1].strip().lower() not in ("utf-8", "utf8"):
        raise ApiError(415, f"the charset is {charset[1]!r}; send UTF-8")
    files: dict[str, list[bytes]] = {}
    values: dict[str, str] = {}
    async with request.form(max_files=20, max_fields=MOST_FORM_FIELDS) as form:
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
