"""A machine leaves its cluster."""

import pytest
import ray
from ray.cluster_utils import Cluster

from rayjobs.config import BadInput
from rayjobs.submission.leave import leave


@pytest.mark.ray
@pytest.mark.slow
def test_this_machine_leaves(no_ray_cluster: None, capsys: pytest.CaptureFixture[str]) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        leave(30.0, cluster.address)
        # Nothing is at work there, and nothing new may begin: Ray ends the node.
        cluster.head_node.all_processes["raylet"][0].process.wait(60)
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert "leaves the cluster" in capsys.readouterr().out


def test_where_no_node_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(**_: object) -> None:
        raise ConnectionError("none")

    monkeypatch.setattr(ray, "init", nothing)
    with pytest.raises(BadInput, match="no Ray node runs on this machine"):
        leave(1.0)
