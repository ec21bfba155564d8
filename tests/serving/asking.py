"""Requests to the API as they are on the wire, and their answers."""

import http.client
import io
import json
from typing import Any

from PIL import Image

GENERATE = "/v1/images/generations"
EDIT = "/v1/images/edits"


def ask(
    url: str, path: str = GENERATE, body: Any = None, method: str = "POST", **headers: str
) -> tuple[int, dict[str, str], Any]:
    """Status, headers and body of an answer."""
    headers = {"content-type": "application/json"} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    headers = {name: value for name, value in headers.items() if value}
    if not isinstance(body, bytes | None):
        body = json.dumps(body).encode()
    host = url.removeprefix("http://")
    connection = http.client.HTTPConnection(host, timeout=30)
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    data = answer.read()
    connection.close()
    told = dict(answer.getheaders())
    is_json = told.get("content-type") == "application/json" and data
    return answer.status, told, json.loads(data) if is_json else data


PROMPT = {"prompt": "a star"}


def png(side: int = 16, colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(buffer, "PNG")
    return buffer.getvalue()


def form(*parts: tuple[str, str | bytes]) -> dict[str, Any]:
    """The body of a form and its content type."""
    data = b""
    for name, value in parts:
        file = '; filename="a.png"' if isinstance(value, bytes) else ""
        data += f'--x\r\ncontent-disposition: form-data; name="{name}"{file}\r\n\r\n'.encode()
        data += (value if isinstance(value, bytes) else value.encode()) + b"\r\n"
    return {"body": data + b"--x--\r\n", "content_type": "multipart/form-data; boundary=x"}
