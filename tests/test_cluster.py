"""The Ray session of a job, beside another cluster on the machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ray._private import worker as ray_worker

from rayjobs import noise
from rayjobs.cluster import LAST_WORDS, REMEMBER_ADDRESS, local

ROOT = Path(__file__).parents[1]

BESIDE = """
import ray
from ray.cluster_utils import Cluster
from rayjobs import cluster

class Living:
    def id(self):
        return ray.get_runtime_context().get_actor_id()

def look_for(actor):
    from ray.util.state import get_actor
    from ray.util.state.exception import RayStateApiException
    try:
        return get_actor(actor) is not None
    except RayStateApiException:
        return "nobody knows"

with cluster.session(2):
    other = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    living = ray.remote(Living).remote()
    actor = ray.get(living.id.remote())
    found = ray.get(ray.remote(look_for).remote(actor))
    assert found, "it was said to be dead"
    other.shutdown()
"""


def test_a_local_cluster_has_a_dashboard_s_address_of_its_own() -> None:
    """Ray's is 8265 everywhere, also where there is no dashboard."""
    options = [local(num_cpus=1) for _ in range(2)]
    assert len({8265} | {each["dashboard_port"] for each in options}) == 3
    assert all(each["runtime_env"] == REMEMBER_ADDRESS for each in options)


def test_ray_s_start_is_silent_but_for_what_matters(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its nodes, which are started before it connects, keep their own level of logging."""
    levels: list[str | None] = []

    def connect() -> None:
        levels.append(os.environ.get(noise.LEVEL))
        os.write(2, noise.ECHO + b" RAY_BACKEND_LOG_LEVEL to 3\nthe cluster burns\n")

    monkeypatch.setattr(ray_worker, "connect", connect)
    monkeypatch.delenv(noise.LEVEL, raising=False)
    with noise.quiet():
        levels.append(os.environ.get(noise.LEVEL))
        ray_worker.connect()  # ty: ignore[missing-argument]
    assert levels == [None, "fatal"]
    assert os.environ.get(noise.LEVEL) is None
    assert ray_worker.connect is connect
    assert capfd.readouterr().err == "the cluster burns\n"
    monkeypatch.setenv(noise.LEVEL, "debug")  # whoever asks for it hears all
    with noise.quiet():
        ray_worker.connect()  # ty: ignore[missing-argument]
    assert levels[-1] == "debug"
    assert noise.ECHO.decode() in capfd.readouterr().err


@pytest.mark.parametrize("kills", [True, False])
def test_a_driver_that_ends_at_once_leaves_a_word(kills: bool) -> None:
    """As Ray ends it when the head is gone."""
    code = f"""
import os
from rayjobs import cluster
with cluster._last_words():
    if {kills}:
        os._exit(1)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert done.stderr == f"{LAST_WORDS}\n" * kills


@pytest.mark.ray
@pytest.mark.slow
def test_an_actor_is_not_sought_in_the_cluster_beside() -> None:
    """Ray Train ends a training whose controller is said to be dead."""
    command, environment = [sys.executable, "-c", BESIDE], os.environ | {"RAY_ADDRESS": ""}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=120)
