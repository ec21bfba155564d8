"""A serving application in processes of its own: started with a configuration, ended by pid."""

import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tests.servers import free_ports

ROOT = Path(__file__).parents[2]
START_S = 180.0
END_S = 60.0

# Of its own cluster whatever else runs on this machine; ended when its input is.
PROGRAM = """
import json, sys
import ray
from ray import serve as ray_serve
from ray.cluster_utils import Cluster
from rayjobs.cluster import REMEMBER_ADDRESS
from serve.app import build
from serve.config import ServeConfig
from tests.warm import use_warm_workers

use_warm_workers()
config, port, nodes = json.loads(sys.argv[1])
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": nodes[0]})
for num_cpus in nodes[1:]:
    cluster.add_node(num_cpus=num_cpus)
# Workers with a runtime environment, whatever it is, can be forks.
ray.init(address=cluster.address, runtime_env=REMEMBER_ADDRESS, log_to_driver=False)
print(cluster.address, flush=True)
http = {"host": "127.0.0.1", "port": port}
ray_serve.start(proxy_location="HeadOnly", http_options=http)
for name, (prefix, args) in config.items():
    ray_serve.run(build(ServeConfig.model_validate(args)), name=name, route_prefix=prefix)
print("ready", flush=True)
for line in sys.stdin:
    for name, (prefix, args) in json.loads(line).items():
        ray_serve.run(build(ServeConfig.model_validate(args)), name=name, route_prefix=prefix)
    print("again", flush=True)
ray_serve.shutdown()
ray.shutdown()
cluster.shutdown()
"""


@dataclass
class Running:
    """A running application."""

    url: str
    address: str
    """Of its Ray cluster."""
    process: subprocess.Popen[str]
    errors: IO[str]

    def redeploy(self, args: dict[str, Any]) -> None:
        """Deploy another configuration in its place; returns when it is there."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"images": ["/", args]}) + "\n")
        self.process.stdin.flush()
        # Ray prints there, too, such as that a worker has died.
        if not any(line.strip() == "again" for line in self.process.stdout):
            raise RuntimeError(_told(self.errors))


@contextmanager
def running(
    args: dict[str, Any],
    nodes: tuple[int, ...] = (4,),
    environment: dict[str, str] | None = None,
    **more: Any,
) -> Generator[Running]:
    """The application of `args` at /, on nodes of so many CPUs each.

    `more` are other applications, by name: a prefix and arguments each.
    """
    [port] = free_ports(1)
    apps = {"images": ["/", args]} | more
    command = [sys.executable, "-c", PROGRAM, json.dumps([apps, port, nodes])]
    variables = os.environ | {"OMP_WAIT_POLICY": "passive", "RAY_SERVE_LOG_TO_STDERR": "0"}
    variables |= environment or {}
    variables.pop("RAY_ADDRESS", None)
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, cwd=ROOT, env=variables, text=True, stdin=-1, stdout=-1, stderr=errors
        )
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            if not any(line.strip() == "ready" for line in process.stdout):
                raise RuntimeError(_told(errors))
            yield Running(f"http://127.0.0.1:{port}", address, process, errors)
        finally:
            end(process)


def _told(errors: IO[str]) -> str:
    errors.seek(0)
    return errors.read()[-3000:]


def end(process: subprocess.Popen[str]) -> None:
    """Ask it to end, by ending its input; a process that will not is killed."""
    try:
        process.communicate(timeout=END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def get(url: str, timeout: float = 30) -> bytes:
    with urllib.request.urlopen(url, timeout=timeout) as response:
        data: bytes = response.read()
        return data


def metrics(url: str) -> dict[str, float]:
    """The samples of /metrics, added up over replicas and models, by name and other labels."""
    from prometheus_client.parser import text_string_to_metric_families

    found: dict[str, float] = {}
    for family in text_string_to_metric_families(get(f"{url}/metrics").decode()):
        for sample in family.samples:
            labels = [f"{k}={v}" for k, v in sample.labels.items() if k not in ("replica", "model")]
            name = " ".join([sample.name, *sorted(labels)]).removeprefix("rayjobs_serve_")
            found[name] = found.get(name, 0) + sample.value
    return found


def wait_until(url: str, holds: Any, seconds: float = 30) -> dict[str, float]:
    """Wait for metrics of which `holds` is true; return them."""
    end_s = time.monotonic() + seconds
    while True:
        found = metrics(url)
        if holds(found):
            return found
        if time.monotonic() > end_s:
            raise AssertionError(f"it did not come true: {found}")
        time.sleep(0.2)
