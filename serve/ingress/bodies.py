"""Request bodies: counted and timed while they come, parsed as JSON or as a form.

Owns those limits and the errors for bodies that cannot be read. Knows no route. Starlette's own
`max_body_size` is not used: where a Content-Length is too large, it replaces every response by a
plain text 413, even a 401, and clients of the API expect OpenAI's JSON errors.
"""

import asyncio
import contextlib
import json
import re
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.types import Message, Receive

from serve.errors import ApiError

MAX_FORM_FIELDS = 64
MAX_JSON_BYTES = 2**20
IDLE_S = 30.0
"""How long a body may pause: who sends nothing more holds a place that others wait for."""
DISCARD_S = 10.0
"""How long the rest of a refused body is read and thrown away."""
FILES = ("image", "mask")
CONTROLS = "control_image"
"""Files that `controls` name."""
INDEXED = re.compile(r"([^\[\]]+)\[\d*\]")
"""`image[]` or `image[0]`, as clients name the parts of a list."""
MEMBER = re.compile(r"([^\[\]]+)\[(\d*)\]\[([^\[\]]+)\]")
"""`loras[][name]` or `loras[0][name]`, as clients name the fields of a list's objects."""


@dataclass
class Form:
    """A form's files, which are read when their turn has come, and its fields."""

    files: dict[str, UploadFile] = field(default_factory=dict)
    controls: dict[str, UploadFile] = field(default_factory=dict)
    """Files of `control_image`, by the names that they were sent with."""
    values: dict[str, Any] = field(default_factory=dict)
    members: list[tuple[str, str, str, str]] = field(default_factory=list)
    """Fields of objects in lists: the list's name, the object's number or "", field and value."""
    warnings: list[str] = field(default_factory=list)


class LimitedBody:
    """A body of at most `max_bytes` which does not pause, as ASGI's `receive`. Raises ApiError."""

    def __init__(self, receive: Receive, max_bytes: int):
        self.receive = receive
        self.max_bytes = max_bytes
        self.is_whole = False
        self._received = 0

    async def __call__(self) -> Message:
        try:
            async with asyncio.timeout(None if self.is_whole else IDLE_S):
                message = await self.receive()
        except TimeoutError:
            raise ApiError(408, f"the body paused for {IDLE_S:g} s") from None
        self._received += len(message.get("body", b""))
        self.is_whole = not message.get("more_body", False)
        if self._received > self.max_bytes:
            raise ApiError(413, f"the request is larger than {self.max_bytes} bytes")
        return message

    async def discard(self) -> None:
        """Read what is left, for a while: a client that still sends does not see its answer."""
        with contextlib.suppress(TimeoutError, ApiError):
            async with asyncio.timeout(DISCARD_S):
                while not self.is_whole:
                    await self()


async def read_json(request: Request, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """A JSON body, refused by its Content-Length or while it comes. Raises ApiError."""
    _check_type(request, "application/json")
    data = bytearray()
    _check_length(int(request.headers.get("content-length") or 0), max_bytes)
    async for chunk in request.stream():
        data += chunk
        _check_length(len(data), max_bytes)
    try:
        return json.loads(bytes(data))
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not valid JSON") from None


@asynccontextmanager
async def open_form(request: Request) -> AsyncGenerator[Form]:
    """The files and the fields of a multipart form; large files lie on disk. Raises ApiError."""
    _check_type(request, "multipart/form-data")
    charset = re.search(r"charset\s*=\s*[\"']?([^;\"']*)", request.headers["content-type"], re.I)
    if charset is not None and charset[1].strip().lower() not in ("utf-8", "utf8"):
        raise ApiError(415, f"the charset is {charset[1]!r}; send UTF-8")
    form = Form()
    async with request.form(max_files=20, max_fields=MAX_FORM_FIELDS) as sent:
        for name, value in sent.multi_items():
            if isinstance(value, UploadFile):
                _add_file(form, name, value)
            else:
                _add_value(form, name, value)
        _add_objects(form)
        yield form


def _add_file(form: Form, name: str, file: UploadFile) -> None:
    """OpenAI's API takes several images; of them the first is used here, which is told."""
    indexed = INDEXED.fullmatch(name)
    plain = indexed[1] if indexed else name
    if plain == CONTROLS and file.filename:
        if file.filename in form.controls:
            told = f"Two files of {plain} are called {file.filename!r}; give each its own name."
            raise ApiError(400, told, param=plain, code="invalid_value")
        form.controls[file.filename] = file
        return
    if plain not in FILES:
        raise ApiError(400, f"Unknown parameter: '{name}'.", param=name, code="unknown_parameter")
    if plain not in form.files:
        form.files[plain] = file
    elif plain == "mask":
        raise ApiError(400, f"Send one {plain}; this API accepts one only.", param=plain)
    elif not form.warnings:
        form.warnings.append("only the first image was used; this API edits one at a time")


def _add_value(form: Form, name: str, value: str) -> None:
    member = MEMBER.fullmatch(name)
    if member is not None:
        form.members.append((member[1], member[2], member[3], value))
        return
    indexed = INDEXED.fullmatch(name)
    name = indexed[1] if indexed else name
    if name in (*FILES, CONTROLS):
        raise ApiError(400, f"{name} must be a file.", param=name, code="invalid_value")
    before = form.values.get(name)
    if indexed and isinstance(before, list | None):
        form.values[name] = [*(before or ()), value]
    elif before is not None:
        raise ApiError(400, f"'{name}' is given twice.", param=name, code="invalid_value")
    else:
        form.values[name] = value


def _add_objects(form: Form) -> None:
    """Lists of objects. Without numbers the n-th value of each field is of the n-th object: some
    clients send object by object, others (OpenAI's) field by field."""
    for plain in {member[0]: None for member in form.members}:
        found: dict[str, dict[str, str]] = {}
        counts: Counter[str] = Counter()
        for _, index, key, value in (each for each in form.members if each[0] == plain):
            place = index or f"unnumbered {counts[key]}"
            counts[key] += not index
            if key in found.setdefault(place, {}):
                raise _unclear(plain)
            found[place][key] = value
        is_unclear = len(set(counts.values()) - {0}) > 1 or plain in form.values
        if is_unclear or (sum(counts.values()) and len(found) > max(counts.values())):
            raise _unclear(plain)
        form.values[plain] = list(found.values())


def _unclear(name: str) -> ApiError:
    message = f"It is unclear which fields of '{name}' belong together; send it as JSON."
    return ApiError(400, message, param=name, code="invalid_value")


def _check_type(request: Request, wanted: str) -> None:
    """A browser sends other types, and none, to foreign servers without asking them first."""
    sent = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if sent != wanted:
        told = f"the content type is {sent!r}" if sent else "there is no content type"
        raise ApiError(415, f"{told}; send {wanted}")
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise ApiError(415, f"the body is encoded with {encoding}; send it as it is")


def _check_length(num_bytes: int, max_bytes: int) -> None:
    if num_bytes > max_bytes:
        raise ApiError(413, f"the body has {num_bytes} bytes or more; at most {max_bytes}")
