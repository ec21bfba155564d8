"""Requests to the API as they are on the wire, and their answers."""

import http.client
import json
from typing import Any

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
