"""Requests to S3 for a shard, counted at a server: a worker's, the driver's and the page's.

A real server (moto) with a real worker and manifest, and no engine. Owns the counting; what so many
requests mean is `tables`' affair.
"""

import contextlib
import logging
import os
import threading
import urllib.parse
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np
from werkzeug.serving import make_server

from benchmarks.scale.driver import configure, entry
from rayjobs import storage
from rayjobs.dataset.gathering import Gathering
from rayjobs.dataset.manifest import GROUP, Manifest
from rayjobs.dataset.records import canonical_json
from rayjobs.generation import job
from rayjobs.storage.door import open_fs

READS = ("GET", "HEAD", "LIST")
FEW, MORE = 2, 6
Requests = Counter[tuple[str, str]]
"""By kind and the first folder below the data set's."""


@dataclass
class Server:
    """A server in a thread of this process, and what it was asked."""

    uri: str
    asked: Requests = field(default_factory=Counter)

    def count(self, act: Callable[[], Any]) -> Requests:
        self.asked.clear()
        act()
        return Counter(self.asked)


def kind_of(environ: dict[str, Any]) -> tuple[str, str]:
    """HEAD, GET, LIST, PUT or DELETE, and the folder: what a limit is counted for."""
    query = urllib.parse.parse_qs(environ.get("QUERY_STRING", ""), keep_blank_values=True)
    method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"].split("/")
    if "list-type" in query:
        prefix = query.get("prefix", [""])[0].split("/")
        return "LIST", prefix[1] if len(prefix) > 1 else ""
    if "delete" in query:
        return "DELETE", "a thousand at once"
    return method, path[3] if len(path) > 4 else ""


@contextlib.contextmanager
def server() -> Generator[Server]:
    from moto.server import DomainDispatcherApplication, create_backend_app

    answer = DomainDispatcherApplication(create_backend_app)
    found = Server("s3://bucket/set")

    def counted(environ: dict[str, Any], start: Any) -> Any:
        found.asked[kind_of(environ)] += 1
        return answer(environ, start)

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = make_server("127.0.0.1", 0, counted, threaded=True)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    variables = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{running.server_port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with patch.dict(os.environ, variables):
        storage.forget_connections()
        open_fs(found.uri)[0].mkdir("bucket")
        try:
            yield found
        finally:
            storage.forget_connections()
            running.shutdown()
            thread.join()
            running.server_close()


def of_worker(at: Server) -> Requests:
    """For each shard that a worker makes, the start left out."""
    from benchmarks.job import NoEngine
    from rayjobs.generation.worker import shards

    config = configure(64 * (FEW + MORE), at.uri)
    lock = job.prepare(config)
    with patch.object(shards, "RecordGenerator", NoEngine):
        worker = shards.ShardWorker(config, lock)
        few = at.count(lambda: list(worker.make(range(FEW))))
        more = at.count(lambda: list(worker.make(range(FEW, FEW + MORE))))
    return Counter({kind: round((more[kind] - few[kind]) / (MORE - FEW)) for kind in more})


def of_driver(at: Server) -> Requests:
    """For each thousand shards whose entries the driver was told."""
    gathering = Gathering(Manifest(at.uri), np.zeros(GROUP, bool))
    told = [entry(Manifest(at.uri), shard, 64, float(shard), 0) for shard in range(GROUP)]
    return at.count(lambda: [gathering.add(each) for each in told])


def of_page(at: Server, num_shards: int = 20) -> Requests:
    """For so many new shards that the page takes in."""
    manifest = Manifest(at.uri)
    for shard in range(GROUP, GROUP + num_shards):
        facts = entry(manifest, shard, 64, float(shard), 0)
        storage.write_bytes(manifest.entry_uri(shard), canonical_json(facts))
    seen = np.zeros(GROUP + num_shards, bool)
    seen[:GROUP] = True
    return at.count(lambda: list(manifest.unseen(seen)))
