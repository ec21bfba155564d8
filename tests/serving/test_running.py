"""A server's file, its start and its end: `python -m serve`."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
import yaml

from rayjobs.config import BadInput
from serve.file import check_port, load
from tests.servers import free_ports
from tests.serving.calls import _ask

ROOT = Path(__file__).parents[2]
KEY = {"name": "me", "sha256": "0" * 64}
# Ray Serve's own models.
pytestmark = pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20")


@pytest.fixture
def running() -> Any:
    from serve import running

    return running


def written(tmp_path: Path, **args: Any) -> str:
    values = {"models": [{"name": "starter", "uri": "starter"}], **args}
    app = {"name": "images", "import_path": "serve.app:build", "args": values}
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump({"applications": [app]}))
    return str(path)


def test_the_shipped_files_are_right() -> None:
    file, values = load(str(ROOT / "configs/demo/serve.yaml"), ["http_options.port=8001"])
    assert file.url == "http://127.0.0.1:8001"
    assert values["applications"][0]["args"]["models"][0]["name"] == "starter"
    load(str(ROOT / "configs/serve.yaml"))


@pytest.mark.parametrize(
    ("args", "overrides", "told"),
    [
        ({"limit": {}}, [], "args.limit: unknown key; did you mean 'limits'?"),
        ({"models": [{"name": "a", "urri": "b"}]}, [], "urri: unknown key; did you mean 'uri'?"),
        ({"aliases": {"a": "b"}}, [], "known are starter"),
        ({"results": {"uri": "/tmp"}}, [], "use an s3:// folder"),
        ({}, ["http_options.host=0.0.0.0"], "auth.keys is empty"),
        ({}, ["http_options.port=high"], "http_options.port is 'high'"),
        ({}, ["applications=[]"], "applications is empty"),
        ({}, ["proxy_location=Nowhere"], "proxy_location"),
    ],
)
def test_a_mistake_is_told(
    tmp_path: Path, args: dict[str, Any], overrides: list[str], told: str
) -> None:
    with pytest.raises(BadInput) as error:
        load(written(tmp_path, **args), overrides)
    assert told in str(error.value)


def test_a_public_host_needs_keys_or_a_word(tmp_path: Path) -> None:
    for auth in ({"keys": [KEY]}, {"allow_anyone": True}):
        file, _ = load(written(tmp_path, auth=auth), ["http_options.host=0.0.0.0"])
        assert file.url == f"http://{socket.gethostname()}:8000"


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_port_that_is_taken(host: str) -> None:
    [port] = free_ports(1)
    check_port(host, port)
    taken = socket.create_server(("127.0.0.1", port), reuse_port=True)
    with taken, pytest.raises(BadInput, match=f"port {port} is taken"):
        check_port(host, port)
    check_port(host, port)


def test_a_host_that_is_not_here() -> None:
    with pytest.raises(BadInput, match=r"on 203.0.113.1 cannot be used"):
        check_port("203.0.113.1", free_ports(1)[0])


def test_a_failure_of_ray_s_is_told_in_a_line(running: Any) -> None:
    reason_in = running.reason_in
    text = "Traceback:\n  File x\nrayjobs.config.BadInput: model a: no such file\n\nmore: of it\n"
    assert reason_in(["", text]) == "model a: no such file"
    assert reason_in(["ray::X\nRuntimeError: one\nValueError: two\n"]) == "ValueError: two"
    assert reason_in([]) == "no reason was given"


@pytest.mark.parametrize(("left", "longest_s", "end"), [([3, 2, 0], 60.0, 0), ([3] * 99, -60.0, 3)])
def test_a_drain_waits_for_all_but_not_for_ever(
    running: Any, monkeypatch: pytest.MonkeyPatch, left: list[int], longest_s: float, end: int
) -> None:
    """Two replicas of one application count together; others have no such replicas."""
    apps = {
        "images": SimpleNamespace(deployments={"Ingress": None, "Engine": None}),
        "other": SimpleNamespace(deployments={"Other": None}),
    }
    answers = iter(left)

    def broadcast(name: str) -> Any:
        assert name == "drain"
        return SimpleNamespace(results=lambda: [next(answers), 0])

    def handle(name: str) -> Any:
        assert name == "images"
        return SimpleNamespace(broadcast=broadcast)

    monkeypatch.setattr(running, "LOOK_EVERY_S", 0.0)
    fake = SimpleNamespace(status=lambda: SimpleNamespace(applications=apps), get_app_handle=handle)
    monkeypatch.setattr(running, "ray_serve", fake)
    told: list[int] = []
    assert running.drain(longest_s, told.append) == end
    assert told == [3]


def started(*overrides: str) -> subprocess.Popen[str]:
    """`make serve` in a session of its own."""
    command = [sys.executable, "-m", "serve", "run", "configs/demo/serve.yaml", *overrides]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, start_new_session=True, stdout=-1, stderr=-2
    )


async def answers(url: str, end: Callable[[], None]) -> Counter[int]:
    """The statuses of 40 requests in flight when the server is told to end, and of 10 after."""
    body = {"prompt": "a star", "size": "64x64", "num_inference_steps": 10}
    timeout = aiohttp.ClientTimeout(total=300)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        early = [asyncio.create_task(_ask(session, url, body)) for _ in range(40)]
        await asyncio.sleep(1)
        end()
        await asyncio.sleep(2)
        late = [asyncio.create_task(_ask(session, url, body)) for _ in range(10)]
        found = await asyncio.gather(*early, *late)
    return Counter(answer.status for answer in found)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_who_ends_a_server_cuts_nobody(number: int) -> None:
    """Ctrl-C reaches the whole group of processes."""
    [port] = free_ports(1)
    server = started(f"http_options.port={port}")
    assert server.stdout is not None
    try:
        url = f"http://127.0.0.1:{port}"
        assert server.stdout.readline() == f"ready, open {url}\n"
        second = started(f"http_options.port={port}")
        told, _ = second.communicate(timeout=60)
        assert (second.returncode, told.count("\n")) == (2, 1)
        assert f"port {port} is taken" in told
        statuses = asyncio.run(answers(url, lambda: os.killpg(server.pid, number)))
        assert statuses == {200: 40, 503: 10}
        told, _ = server.communicate(timeout=120)
        assert server.returncode == 0
        assert told.splitlines()[-1] == "all requests are answered"
    finally:
        server.kill()
        server.communicate()
