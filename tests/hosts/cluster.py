"""A Ray cluster on two hosts, started as cluster.yaml does, and what a user does with it.

Owns the nodes' start, loss and return, and the calls of `rayjobs` from this machine, which is
neither host.
"""

import json
import os
import re
import secrets
import subprocess
import sys
import time
import urllib.error
import urllib.request
from typing import Any

from tests.hosts.network import NUMBERS, Network
from tests.nodes import ROOT, bare_python, install, wait_for

CPUS = 3
ONE_A_HOST = ("workers.min=2", "workers.num_cpus=1.9")
"""With these a worker, of one thread, fits on each host, beside Ray Data's own tasks."""
STORE_BYTES = 80 * 2**20
START_S = 180


class Cluster:
    """Host 1 has the head, host 2 joins it; with a token."""

    def __init__(self, network: Network, variables: dict[str, str]) -> None:
        self.network = network
        self._submitted: list[subprocess.Popen[str]] = []
        python = network.folder / "python"
        self.python = bare_python(python)
        install(self.python, network.code)
        self.address = f"http://{network.host(1)}:8265"
        self._token = secrets.token_hex(32)
        ours = ("RAY_", "AWS_", "PYTHONPATH", "RAYJOBS_")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
        self.environment = (
            kept
            | variables
            | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self._token}
            | {"RAY_USAGE_STATS_ENABLED": "0", "PATH": f"{python}/bin:{os.environ['PATH']}"}
        )

    def start(self) -> None:
        """Both nodes, whatever became of those that were there."""
        for number in NUMBERS:
            self.network.stop(number)
            self.network.heal(number)
        self._start_node(1)
        wait_for(lambda: self.ask("/api/version"), START_S)
        self.bring_back(2)

    def make_whole(self) -> None:
        """Both nodes, whatever became of them; those that are well stay."""
        if not self.network.is_running(1):
            self.start()
        elif not self.network.is_running(2) or self.network.host(2) not in self.living():
            self.bring_back(2)

    def bring_back(self, number: int) -> None:
        """A new node on a host whose own is gone, as when a machine is replaced."""
        self.network.stop(number)
        self.network.heal(number)
        wait_for(lambda: len(self.living()) == 1, START_S)
        self._start_node(number)
        wait_for(lambda: len(self.living()) == 2, START_S)

    def _start_node(self, number: int) -> None:
        place, own = self.network.folder / str(number), self.network.host(number)
        place.mkdir(exist_ok=True)
        joins = (f"--address={self.network.host(1)}:6379",)
        heads = ("--head", "--port=6379", "--dashboard-host=0.0.0.0")
        command = (
            *(self.python, "-m", "ray.scripts.scripts", "start", "--block"),
            *(f"--temp-dir={place}", f"--node-ip-address={own}", f"--num-cpus={CPUS}"),
            *(f"--object-store-memory={STORE_BYTES}", *(heads if number == 1 else joins)),
        )
        homes = {"HOME": str(place), "RAYJOBS_CACHE": str(place / "models")}
        settings = head_settings() if number == 1 else {}
        self.network.start(number, [*command], self.environment | homes | settings)

    def living(self) -> list[str]:
        """The addresses of nodes that Ray has not declared dead."""
        told = self.ask("/nodes?view=summary")["data"]["summary"]
        return [n["ip"] for n in told if n["raylet"]["state"] == "ALIVE"]

    def await_death(self, number: int = 2) -> float:
        """The seconds until Ray has declared a host's node dead."""
        started = time.monotonic()
        wait_for(lambda: self.network.host(number) not in self.living(), START_S)
        return time.monotonic() - started

    def ask(self, path: str) -> Any:
        """What the dashboard answers."""
        headers = {"Authorization": f"Bearer {self._token}"}
        request = urllib.request.Request(f"{self.address}{path}", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            error.close()
            raise

    def submit(self, *command: str) -> subprocess.Popen[str]:
        """`rayjobs submit` as a user would call it."""
        own = ("--address", self.address, "--python", self.python)
        job = subprocess.Popen(
            [sys.executable, "-m", "rayjobs", "submit", *command, *own],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._submitted.append(job)
        return job

    def leave(self) -> None:
        """End what follows jobs still, as after a test that failed."""
        while self._submitted:
            with self._submitted.pop() as job:
                job.kill()

    def ray_job(self, *command: str) -> tuple[int, str]:
        """Exit code and output of `ray job ...`, as KubeRay calls it."""
        ray = (self.python, "-m", "ray.scripts.scripts")
        done = subprocess.run(
            [*ray, "job", command[0], "--address", self.address, *command[1:]],
            cwd=self.network.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=400,
        )
        return done.returncode, done.stdout + done.stderr


def head_settings() -> dict[str, str]:
    """The variables that cluster.yaml gives the head for noticing lost nodes."""
    text = (ROOT / "cluster.yaml").read_text()
    return dict(re.findall(r"(RAY_health_check_\w+)=(\d+)", text))


def ended(job: subprocess.Popen[str], seconds: float = 400) -> str:
    """All that a job said, once it has ended well."""
    try:
        said, _ = job.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        job.kill()
        said, _ = job.communicate()
    assert job.returncode == 0, said
    return said
