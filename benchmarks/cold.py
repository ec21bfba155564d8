"""A cold start: processes of one machine that need the same model from S3 at once.

`python -m benchmarks.cold [--gb 3] [--processes 4] [--stream-mb 0] [--latency-ms 0]`

Random weights of SDXL's shapes, as many as fit into so many GB, lie on a small S3 server of its own
process, which counts its bytes and may bound each connection, as S3 does. Three ways are timed, in
turn, until the last process has the files:

* `fetch`: `rayjobs.storage.fetch`: one copy for the machine, in ranges at the same time, checked.
* `before`: as it was before: one copy for the machine under the same lock, file after file by s3fs,
  which reads ten ranges at once, in one thread.
* `sync`: what `aws s3 sync` does: boto3's transfer manager, a copy for each process.
"""

import argparse
import contextlib
import fcntl
import hashlib
import http.server
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np

from rayjobs.diffusion.files import layout

PARTS = {
    "unet/diffusion_pytorch_model.safetensors": (
        layout.unet,
        {
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "block_out_channels": [320, 640, 1280],
            "transformer_layers_per_block": [1, 2, 10],
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "projection_class_embeddings_input_dim": 2816,
        },
    ),
    "text_encoder_2/model.safetensors": (
        layout.text_encoder,
        {
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_hidden_layers": 32,
            "projection_dim": 1280,
        },
    ),
    "text_encoder/model.safetensors": (
        layout.text_encoder,
        {"hidden_size": 768, "intermediate_size": 3072, "projection_dim": 768},
    ),
    "vae/diffusion_pytorch_model.safetensors": (
        layout.vae,
        {
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
            "block_out_channels": [128, 256, 512, 512],
            "layers_per_block": 2,
        },
    ),
}
PART_BYTES = 8 << 20
"""Of the objects' uploads, which decides their ETags: that of the AWS tools."""
CHILD = """
import sys, boto3, s3fs
from pathlib import Path
from benchmarks import cold
from rayjobs import storage
print("ready", flush=True)
sys.stdin.read()
cold.{way}(Path({cache!r}))
"""
WAYS = ("fetch", "before", "sync")


def make_model(folder: Path, max_bytes: int) -> int:
    """Random weights in float16, of SDXL's shapes until `max_bytes` are full; the bytes made."""
    rng, left = np.random.default_rng(0), max_bytes
    noise = rng.bytes(64 << 20)
    for name, (shapes_of, config) in PARTS.items():
        header: dict[str, Any] = {}
        at = 0
        for key, shape in (shapes_of(config) or {}).items():
            size = 2 * int(np.prod(shape))
            if size > left:
                break
            header[key] = {"dtype": "F16", "shape": shape, "data_offsets": [at, at + size]}
            at, left = at + size, left - size
        text = json.dumps(header).encode()
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with (folder / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            while at > 0:
                file.write(noise[: min(at, len(noise))])
                at -= len(noise)
    return max_bytes - left


def etag(path: Path) -> str:
    digests = []
    with path.open("rb") as file:
        while data := file.read(PART_BYTES):
            digests.append(hashlib.md5(data, usedforsecurity=False).digest())
    whole = hashlib.md5(b"".join(digests), usedforsecurity=False)
    return f"{whole.hexdigest()}-{len(digests)}"


class Server(http.server.ThreadingHTTPServer):
    """Answers what an S3 client asks who lists, heads and reads one bucket: a folder."""

    daemon_threads, request_queue_size = True, 256

    def __init__(self, folder: Path, stream_bytes_s: float, latency_s: float):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.stream_bytes_s, self.latency_s = folder, stream_bytes_s, latency_s
        names = sorted(path for path in folder.rglob("*") if path.is_file())
        self.objects = {str(path.relative_to(folder)): (path, etag(path)) for path in names}
        self.sent, self.lock = 0, threading.Lock()


class Handler(http.server.BaseHTTPRequestHandler):
    server: Any
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        time.sleep(self.server.latency_s)
        url = urllib.parse.urlparse(self.path)
        query = urllib.parse.parse_qs(url.query)
        key = urllib.parse.unquote(url.path).lstrip("/").partition("/")[2]
        if url.path == "/_sent":
            return self._text(str(self.server.sent))
        if not key:
            return self._text(self._listing(query.get("prefix", [""])[0]), "application/xml")
        if key not in self.server.objects:
            self.send_response(404)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        path, mark = self.server.objects[key]
        size = path.stat().st_size
        start, end = 0, size
        if wanted := self.headers.get("Range"):
            first, last = wanted.removeprefix("bytes=").split("-")
            start, end = int(first), min(int(last) + 1 if last else size, size)
        elif "partNumber" in query:
            end = min(PART_BYTES, size)
        self.send_response(206 if end - start < size else 200)
        self.send_header("ETag", f'"{mark}"')
        self.send_header("Content-Length", str(end - start))
        self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if with_body:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self._send(path, start, end)

    def _text(self, text: str, kind: str = "text/plain") -> None:
        data = text.encode()
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _listing(self, prefix: str) -> str:
        entries = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{path.stat().st_size}</Size>"
            f'<ETag>"{mark}"</ETag><LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>'
            for key, (path, mark) in self.server.objects.items()
            if key.startswith(prefix)
        )
        xmlns = "http://s3.amazonaws.com/doc/2006-03-01/"
        return (
            f'<ListBucketResult xmlns="{xmlns}"><IsTruncated>false</IsTruncated>{entries}'
            "</ListBucketResult>"
        )

    def _send(self, path: Path, start: int, end: int) -> None:
        rate, began, first = self.server.stream_bytes_s, time.monotonic(), start
        with path.open("rb") as file:
            while start < end:
                most = min(1 << 20, end - start)
                sent = os.sendfile(self.connection.fileno(), file.fileno(), start, most)
                start += sent
                with self.server.lock:
                    self.server.sent += sent
                if rate and (ahead := (start - first) / rate - (time.monotonic() - began)) > 0:
                    time.sleep(ahead)


def fetch(cache: Path) -> None:
    from rayjobs import storage

    storage.fetch("s3://bucket/model")


def before(cache: Path) -> None:
    from rayjobs.storage.door import find, open_fs

    fs = open_fs("s3://bucket/model")[0]
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (cache / "done").exists():
            for name in find("s3://bucket/model"):
                path = cache / name
                path.parent.mkdir(parents=True, exist_ok=True)
                fs.get_file(name, str(path))
            (cache / "done").touch()


def sync(cache: Path) -> None:
    import boto3

    client, mine = boto3.client("s3"), cache / str(os.getpid())
    for found in client.list_objects_v2(Bucket="bucket", Prefix="model/")["Contents"]:
        path = mine / found["Key"]
        path.parent.mkdir(parents=True, exist_ok=True)
        client.download_file("bucket", found["Key"], str(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--gb", type=float, default=3.0)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--stream-mb", type=float, default=0, help="of a connection, a second")
    parser.add_argument("--latency-ms", type=float, default=0, help="of each request")
    parser.add_argument("--folder", type=Path, help="where there is room for it all")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="cold-") as name:
        total = make_model(Path(name, "bucket", "model"), int(options.gb * 1e9))
        server = Server(Path(name, "bucket"), options.stream_mb * 1e6, options.latency_ms / 1000)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for way in WAYS:
            print(
                json.dumps(measure(way, server, Path(name), total, options.processes)), flush=True
            )
        server.shutdown()


def measure(way: str, server: Server, place: Path, total: int, processes: int) -> dict[str, Any]:
    """Seconds until the last of the processes has the files, and what the server sent."""
    cache = place / way
    cache.mkdir()
    environment = os.environ | {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_address[1]}",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
        "RAYJOBS_CACHE": str(cache),
    }
    code = CHILD.format(way=way, cache=str(cache))
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for _ in range(processes)
    ]
    for process in running:  # all have what they need of Python
        assert process.stdout is not None
        process.stdout.readline()
    sent, started, used = server.sent, time.monotonic(), cpu_s()
    for process in running:
        assert process.stdin is not None
        process.stdin.close()
    failed = sum(process.wait() != 0 for process in running)
    seconds = time.monotonic() - started
    shutil.rmtree(cache)
    return {
        "way": way,
        "processes": processes,
        "model_gb": round(total / 1e9, 2),
        "seconds": round(seconds, 1),
        "gb_s": round(total / 1e9 / seconds, 3),
        "sent_of_model": round((server.sent - sent) / total, 2),
        "cpu_s": round(cpu_s() - used, 1),
        "failed": failed,
    }


def cpu_s() -> float:
    """Of the processes that have ended, which are the clients."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
