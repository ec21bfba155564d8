"""Tells a Ray cluster that this machine will be taken away, and waits until its workers have ended.

Owns no machine: a pod's preStop hook or a cloud's termination handler runs it there. What workers
do on notice is theirs.
"""

import logging
import time

import psutil
import ray
from ray._raylet import GcsClient  # type: ignore
from ray.core.generated import autoscaler_pb2

from rayjobs.config import BadInput, JobFailed

LOOK_EVERY_S = 1.0
PREEMPTION = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")  # type: ignore


def leave(seconds: float, address: str = "auto") -> int:
    """Returns when no worker is at work here, or after so long."""
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError:
        raise BadInput("no Ray node runs on this machine, so there is none to leave") from None
    try:
        _drain(ray.get_runtime_context().get_node_id(), seconds)
    finally:
        ray.shutdown()
    until_s = time.monotonic() + seconds
    while (left := _num_at_work()) and time.monotonic() < until_s:
        time.sleep(LOOK_EVERY_S)
    print(f"this machine leaves the cluster, with {left} workers at work")
    return 0


def _drain(node: str, seconds: float) -> None:
    deadline_ms = round(1000 * (time.time() + seconds))
    cluster = GcsClient(address=ray.get_runtime_context().gcs_address)
    is_taken, reason = cluster.drain_node(node, PREEMPTION, "rayjobs leave", deadline_ms)
    if not is_taken:
        raise JobFailed(f"the cluster does not let this machine go: {reason}")


def _num_at_work() -> int:
    """Ray's processes that run tasks or actors, which call themselves so."""
    titles = [" ".join(each.info["cmdline"] or ()) for each in psutil.process_iter(["cmdline"])]
    return sum(title.startswith("ray::") and title[5:9] != "IDLE" for title in titles)
