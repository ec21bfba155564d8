"""Room for workers: what fits, what is told, and when waiting ends. No cluster is started."""

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._private import worker as ray_worker
from ray.exceptions import AuthenticationError

from rayjobs import cluster, room
from rayjobs.config import BadInput, JobFailed, Workers


def node(cpus: float, gpus: float = 0, alive: bool = True) -> dict[str, Any]:
    resources = {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
    return {"Alive": alive, "Resources": resources}


@pytest.mark.parametrize(
    ("workers", "nodes", "fitting"),
    [
        ({}, [node(4)], 4),
        ({"num_cpus": 3}, [node(4), node(2)], 1),
        ({"num_cpus": 3}, [node(2), node(2)], 0),
        ({"num_gpus": 1}, [node(16)], 0),
        ({"num_gpus": 0.25}, [node(16, 1)], 4),
        ({"num_gpus": 2}, [node(16, 3), node(16, 8, alive=False)], 1),
        ({"num_cpus": 0.1}, [node(1)], 10),
    ],
)
def test_what_fits(workers: dict[str, float], nodes: list[dict[str, Any]], fitting: int) -> None:
    assert room.num_fitting(Workers(**workers), nodes) == fitting


def test_a_folder_that_goes_with_the_job_is_refused() -> None:
    place = "/tmp/ray/session_1/runtime_resources/working_dir_files/_ray_pkg_1/out"
    with pytest.raises(BadInput, match=r"output.uri: .*deleted with the job; give s3://"):
        room.check_shared(place)
    room.check_shared("s3://bucket/out")


def test_a_folder_that_other_nodes_do_not_see_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Here:
        def get_node_id(self) -> str:
            return "a"

    others = [node(4) | {"NodeID": name, "NodeManagerAddress": name} for name in "abc"]
    head = node(0) | {"NodeID": "head", "NodeManagerAddress": "head"}
    probed: list[list[str]] = []

    def blind(nodes: list[dict[str, Any]], path: str) -> list[str]:
        assert Path(path).parent == tmp_path
        assert Path(path).exists()
        probed.append([each["NodeID"] for each in nodes])
        return ["b"]

    monkeypatch.setattr(room.ray, "get_runtime_context", Here)
    monkeypatch.setattr(room.ray, "nodes", lambda: [*others, head])
    monkeypatch.setattr(room, "_blind", blind)
    told = r"1 of 2 other nodes do not see it \(b\). Give s3://"
    with pytest.raises(BadInput, match=told):
        room.check_shared(str(tmp_path))
    assert probed == [["b", "c"]]
    assert list(tmp_path.iterdir()) == []


class Time:
    """In place of the module, whose clock other threads of these tests read too."""

    def __init__(self, clock: Iterator[int]):
        self._clock = clock

    def monotonic(self) -> float:
        return next(self._clock)

    def sleep(self, seconds: float) -> None:
        pass


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The cluster's nodes; each look takes 20 minutes."""
    clock, there = iter(range(0, 100_000, 1200)), [node(2)]
    monkeypatch.setattr(room.ray, "nodes", lambda: there)
    monkeypatch.setattr(room.ray, "available_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr(room, "time", Time(clock))
    return there


def test_waiting_is_told_and_ends(
    nodes: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    demanded: list[list[dict[str, float]]] = []
    monkeypatch.setattr(
        "ray.autoscaler.sdk.request_resources", lambda bundles: demanded.append(bundles)
    )
    asked = Workers(num_gpus=1)
    told = "a worker asks for 1 CPUs and 1 GPUs; there is 2 CPUs and 0 GPUs on 1 node"
    with pytest.raises(BadInput, match=f"{told}.*; ask for less with workers.num_gpus"):
        room.await_room(asked, 1, is_own=True)
    with pytest.raises(JobFailed, match=f"{told}, which holds none, and none came in 30 minutes"):
        room.await_room(asked, 1, is_own=False)
    assert f"{told}, which holds none; waiting for nodes" in capsys.readouterr().err
    # An autoscaler brings nodes only for what is demanded, and keeps them until that is taken back.
    assert demanded == [[{"CPU": 1, "GPU": 1}], []]
    monkeypatch.setattr(room.time, "sleep", lambda _: nodes.append(node(8, 1)))
    room.await_room(asked, 1, is_own=False)
    assert "all that fits is in use by others" in capsys.readouterr().err
    room.await_room(Workers(), 2, is_own=True)
    with pytest.raises(BadInput, match=r"20 workers ask for .* on 2 nodes .*holds 10 of them"):
        room.await_room(Workers(), 20, is_own=True)
    assert capsys.readouterr().err == ""


def test_a_machine_without_gpus_is_told_before_a_cluster_is_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_OVERRIDE_RESOURCES", '{"CPU": 2, "GPU": 1}')
    room.check_machine(Workers(num_gpus=1, num_cpus=64))
    with pytest.raises(BadInput, match=r"asks for 1 CPUs and 2 GPUs; there is \d+ CPUs and 1 GPUs"):
        room.check_machine(Workers(num_gpus=2))


def test_a_cluster_that_does_not_answer_is_told_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where something takes the connection and then says nothing."""
    monkeypatch.setattr(cluster, "ANSWER_S", 0.3)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
        for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}"):
            with pytest.raises(BadInput, match=f"address is {address}, where no cluster"):
                cluster.check_answers(address)
        listening.listen()
        for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}"):
            with pytest.raises(BadInput, match="something listens there, but no Ray"):
                cluster.check_answers(address)
    cluster.check_answers("somewhere")
    monkeypatch.setattr("ray._private.utils.read_ray_address", lambda: f"127.0.0.1:{port}")
    with pytest.raises(BadInput, match="where no cluster answers"):
        cluster.check_answers("auto")
    monkeypatch.setattr("ray._private.utils.read_ray_address", lambda: None)
    cluster.check_answers("auto")
    with pytest.raises(BadInput, match="where no cluster answers"):
        cluster.check_answers("no-such-host.invalid:6379")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError("AF_UNIX path length cannot exceed 107 bytes: /x\nmore"), "set RAY_TMPDIR to a"),
        (
            RuntimeError("The client is older\nTraceback ..."),
            "Ray cannot start: The client is older",
        ),
        (
            AuthenticationError("no token"),
            "asks for a token: .*RAY_AUTH_TOKEN",
        ),
    ],
)
def test_ray_that_does_not_start_is_one_line(
    error: Exception, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_: object) -> None:
        raise error

    monkeypatch.setattr(ray, "init", fail)
    with pytest.raises(BadInput, match=told) as caught:
        cluster.start({"address": "local"})
    assert "\n" not in str(caught.value)


def test_the_rest_of_a_failure_is_in_a_file(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line is told; Ray's own tracebacks are not printed, but kept."""
    monkeypatch.setattr(ray, "init", lambda **_: None)
    cluster.start({"address": "local"})
    ray_worker.print_to_stdstream(
        {"lines": ["Traceback of a worker"], "pid": "raylet", "is_err": False}, ignore_prefix=False
    )
    assert capsys.readouterr().out == ""
    failure = cluster.unwrap_error(RuntimeError("Traceback\n  more\nValueError: no model\n"))
    assert (type(failure), str(failure)) == (JobFailed, "ValueError: no model")
    path = Path(capsys.readouterr().err.split()[-1])
    assert "Traceback of a worker" in path.read_text()
    assert "more" in path.read_text()
    path.unlink()
