"""What callers see when replicas die, configurations change, and callers leave."""

import io
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest
from PIL import Image

from rayjobs.diffusion.engine import Engine
from rayjobs.diffusion.model import Model
from rayjobs.diffusion.request import Request
from tests.serving.calls import Answer, ask_all, leave, mixed
from tests.serving.running import Running, metrics, running, wait_until

pytestmark = pytest.mark.ray
Picture = Callable[[int], Image.Image]
TWO = {
    "models": [{"name": "starter", "uri": "starter"}],
    "scaling": {"min": 2, "max": 2},
    "engine": {"max_pending_s": 3000},  # however slow the machine is, nobody is one too many
}


@pytest.fixture(scope="module")
def two() -> Iterator[Running]:
    with running(TWO, nodes=(6,)) as found:
        yield found


def replicas(app: Running, kind: str = "Engine") -> list[psutil.Process]:
    """The replicas of this application, not of another that may run here.

    They may be forks of a server of warm workers, so it is their connections that tell.
    """
    return [
        process
        for process in psutil.process_iter()
        if f"ServeReplica:images:{kind}" in _command(process) and _is_of(process, app.address)
    ]


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has just ended
        return ""


def _is_of(process: psutil.Process, address: str) -> bool:
    """Whether it talks to the cluster at `address`."""
    port = int(address.rpartition(":")[2])
    return any(each.raddr and each.raddr.port == port for each in process.net_connections("tcp"))


def refused(answers: list[Answer]) -> list[tuple[int, object]]:
    return [(each.status, each.body) for each in answers if each.status != 200]


@pytest.mark.slow
def test_a_killed_replica_costs_no_answer(two: Running, starter: Model) -> None:
    def kill() -> None:
        time.sleep(1)
        victims = replicas(two)
        assert len(victims) == 2
        os.kill(victims[0].pid, signal.SIGKILL)

    bodies = mixed(40, seed=1)
    answers = ask_all(two.url, bodies, meanwhile=kill)
    assert not refused(answers)
    body, answer = bodies[0], answers[0]
    width, height = map(int, body["size"].split("x"))
    request = Request(
        prompt=body["prompt"],
        seed=body["seed"],
        steps=body["num_inference_steps"],
        guidance_scale=body["guidance_scale"],
        sampler=body["sampler"],
        width=width,
        height=height,
    )
    (result,) = Engine(starter, 1).generate([request])
    assert np.abs(answer.pictures()[0] - np.asarray(result.image, int)).max() <= 1


@pytest.mark.slow
def test_a_new_configuration_costs_no_answer(two: Running) -> None:
    def redeploy() -> None:
        time.sleep(0.5)
        two.redeploy(TWO | {"engine": {"max_rows": 6}})

    assert not refused(ask_all(two.url, mixed(40, seed=2), gap_s=0.05, meanwhile=redeploy))
    assert not refused(ask_all(two.url, mixed(5, seed=3)))


def test_a_caller_who_leaves_frees_the_rows(app: Running) -> None:
    before = metrics(app.url).get("cancelled_rows_total", 0)
    plain = {"prompt": "a", "num_inference_steps": 150, "n": 2}
    for number, body in enumerate([plain, plain | {"stream": True, "partial_images": 1}]):
        leave(app.url, body, after_s=0.4)
        want = before + 2 * (number + 1)
        found = wait_until(
            app.url, lambda m, want=want: m["rows"] == 0 and m.get("cancelled_rows_total") == want
        )
        assert found["pending_seconds"] < 0.01


@pytest.mark.slow
def test_a_thousand_who_leave_leave_nothing_behind(app: Running, picture: Picture) -> None:
    buffer = io.BytesIO()
    picture(1).save(buffer, "PNG")
    kinds = [
        {"prompt": "a", "num_inference_steps": 150},
        {"prompt": "a", "num_inference_steps": 150, "stream": True, "partial_images": 2, "n": 2},
        {"prompt": "a", "num_inference_steps": 150, "image": buffer.getvalue(), "strength": 1.0},
    ]

    def abandon(number: int) -> None:
        leave(app.url, kinds[number % 3], after_s=number % 7 * 0.05)

    def memory() -> float:
        wait_until(app.url, lambda found: found["rows"] == 0, seconds=120)
        return sum(each.memory_info().rss for each in [*replicas(app), *replicas(app, "Ingress")])

    with ThreadPoolExecutor(20) as callers:
        list(callers.map(abandon, range(300)))
        before = memory()
        list(callers.map(abandon, range(1000)))
    assert memory() < 1.05 * before
    assert metrics(app.url)["pending_seconds"] < 0.01
    assert not refused(ask_all(app.url, mixed(3)))
