"""As much of the Hugging Face Hub as uploading and loading a data set asks of it."""

import base64
import hashlib
import json
import threading
import urllib.parse
from collections.abc import Callable, Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub:
    """What it holds: repositories with their newest files, objects by hash, uploads by hash."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}
        self.uploads: list[str] = []
        self.on_upload: Callable[[int], None] = lambda count: None
        """Called before the upload of that number is answered."""
        self.url = ""
        self.turn = threading.Lock()

    def sha(self, name: str) -> str:
        return hashlib.sha1(repr(sorted(self.repositories[name])).encode()).hexdigest()

    def listed(self, name: str) -> list[dict[str, Any]]:
        return [
            {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for path, data in sorted(self.repositories[name].items())
        ]

    def tree(self, name: str, folder: str, recursive: bool) -> list[dict[str, Any]]:
        """The files below a folder; those of folders in it only if asked, else the folders."""
        inside = [
            f for f in self.listed(name) if f["path"].startswith(f"{folder}/" if folder else "")
        ]
        if recursive:
            return inside
        depth = folder.count("/") + 2 if folder else 1
        deep = [f["path"].split("/") for f in inside if f["path"].count("/") >= depth]
        folders = sorted({"/".join(parts[:depth]) for parts in deep})
        files = [f for f in inside if f["path"].count("/") < depth]
        return [{"type": "directory", "path": path, "oid": "0" * 40} for path in folders] + files

    def commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        files = self.repositories[name]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                files.pop(value["path"], None)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        parts = urllib.parse.unquote(self.path.split("?")[0]).strip("/").split("/")
        if parts[0] == "datasets" and "/".join(parts[1:3]) in self.hub.repositories:
            self._file("/".join(parts[1:3]), "/".join(parts[5:]))
            return
        name = "/".join(parts[2:4])
        if parts[:2] != ["api", "datasets"] or name not in self.hub.repositories:
            self._answer({"error": "Repository not found"}, 404, {"x-error-code": "RepoNotFound"})
        elif "tree" in parts:
            self._answer(
                self.hub.tree(name, "/".join(parts[6:]), "recursive=true" in self.path.lower())
            )
        else:
            siblings = [{"rfilename": path} for path in sorted(self.hub.repositories[name])]
            facts = {"id": name, "sha": self.hub.sha(name), "siblings": siblings, "tags": []}
            self._answer(facts | {"private": True, "downloads": 0, "likes": 0})

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["content-length"]))
        with self.hub.turn:
            self.hub.on_upload(len(self.hub.uploads))
            self.hub.uploads.append(oid := hashlib.sha256(data).hexdigest())
            self.hub.objects[oid] = data
        self._answer({})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        parts = urllib.parse.unquote(self.path.split("?")[0]).strip("/").split("/")
        if parts == ["api", "repos", "create"]:
            self._create(json.loads(body))
        elif parts == ["api", "validate-yaml"]:
            self._answer({"errors": [], "warnings": []})
        elif parts[-1] == "batch":
            self._answer({"objects": [self._batch(each) for each in json.loads(body)["objects"]]})
        elif parts[4] == "preupload":
            self._answer({"files": [self._mode(each) for each in json.loads(body)["files"]]})
        elif parts[4] == "paths-info":
            wanted = (
                urllib.parse.parse_qs(body.decode())["paths"]
                if body[:1] != b"{"
                else (json.loads(body)["paths"])
            )
            listed = self.hub.listed("/".join(parts[2:4]))
            self._answer([each for each in listed if each["path"] in wanted])
        else:
            name = "/".join(parts[2:4])
            self.hub.commit(name, [json.loads(line) for line in body.splitlines()])
            url = f"{self.hub.url}/datasets/{name}/commit/{self.hub.sha(name)}"
            self._answer({"success": True, "commitUrl": url, "commitOid": self.hub.sha(name)})

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        status = 409 if name in self.hub.repositories else 200
        self.hub.repositories.setdefault(name, {})
        self._answer({"url": f"{self.hub.url}/datasets/{name}", "name": name}, status)

    def _batch(self, asked: dict[str, Any]) -> dict[str, Any]:
        facts = {"oid": asked["oid"], "size": asked["size"]}
        if asked["oid"] in self.hub.objects:
            return facts
        return facts | {"actions": {"upload": {"href": f"{self.hub.url}/objects/{asked['oid']}"}}}

    def _mode(self, asked: dict[str, Any]) -> dict[str, Any]:
        mode = "lfs" if asked["path"].startswith("data/") else "regular"
        return {"path": asked["path"], "uploadMode": mode, "shouldIgnore": False}

    def _file(self, name: str, path: str) -> None:
        data = self.hub.repositories[name].get(path)
        if data is None:
            self._answer({"error": "not there"}, 404, {"x-error-code": "EntryNotFound"})
            return
        headers = {"etag": f'"{hashlib.sha1(data).hexdigest()}"'}
        headers["x-repo-commit"] = self.hub.sha(name)
        self._answer(data, 200, headers)

    def _answer(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        kind = "application/octet-stream" if isinstance(value, bytes) else "application/json"
        self.send_response(status)
        for name, text in {"content-type": kind, **(headers or {})}.items():
            self.send_header(name, text)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@contextmanager
def hub_server() -> Generator[Hub]:
    """A Hub of one's own, for processes that have its url as HF_ENDPOINT."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
