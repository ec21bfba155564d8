"""Room on a cluster: nodes on which workers fit, and a place for outputs that all of them see.

Owns the comparison and what is told. Knows nothing of what the workers do.
"""

import os
import sys
import tempfile
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray._private.resource_and_label_spec import ResourceAndLabelSpec
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayjobs import storage
from rayjobs.config import BadInput, JobFailed, Workers

PATIENCE_S = 1800.0
"""How long an autoscaler, or a person, has to bring nodes on which workers fit."""
TELL_EVERY_S = 60.0
POLL_S = 2.0
PROBE_S = 60.0
PACKAGES = "/runtime_resources/working_dir_files/"
"""Where Ray unpacks the working directory of a submitted job, and deletes it afterwards."""


def await_room(workers: Workers, count: int, is_own: bool) -> None:
    """Return once `count` workers fit into the cluster, however busy it is.

    Tells at once what is asked for and what is there while they do not. Raises BadInput when
    nothing can change that, as in a cluster of this process's own, JobFailed after half an hour.
    """
    fitting = num_fitting(workers, ray.nodes())
    if fitting < count:
        if is_own:
            lack = describe_lack(workers, count, fitting, ray.nodes())
            raise BadInput(f"{lack}; {_way_out(workers)}")
        with _demand(workers, count):
            _await_nodes(workers, count)
    if _on(workers, ray.available_resources()) < 1:
        print("all that fits is in use by others; waiting for it", file=sys.stderr, flush=True)


def _await_nodes(workers: Workers, count: int) -> None:
    started = told = time.monotonic()
    while (fitting := num_fitting(workers, ray.nodes())) < count:
        lack = describe_lack(workers, count, fitting, ray.nodes())
        waited = time.monotonic() - started
        if waited > PATIENCE_S:
            raise JobFailed(f"{lack}, and none came in {PATIENCE_S / 60:.0f} minutes")
        if not waited or time.monotonic() - told > TELL_EVERY_S:
            told = time.monotonic()
            print(f"{lack}; waiting for nodes, {_way_out(workers)}", file=sys.stderr, flush=True)
        time.sleep(POLL_S)


@contextmanager
def _demand(workers: Workers, count: int) -> Generator[None]:
    """Meanwhile an autoscaler is to bring room for these: nothing that runs asks for it yet.

    What is demanded so outlives its job, so it is taken back.
    """
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=[_asked(workers)] * count)
    try:
        yield
    finally:
        request_resources(bundles=[])


def check_machine(workers: Workers) -> None:
    """Raise BadInput at once when a worker needs more GPUs than this machine has.

    For a cluster of this process's own, before it is started.
    """
    here = {"CPU": os.cpu_count() or 1, "GPU": ResourceAndLabelSpec().resolve(True).num_gpus}
    if workers.num_gpus > (here["GPU"] or 0):
        lack = describe_lack(workers, 1, 0, [{"Alive": True, "Resources": here}])
        raise BadInput(f"{lack}; {_way_out(workers)}")


def check_shared(uri: str, key: str = "output.uri") -> None:
    """Raise BadInput, naming `key`, for a local folder that other nodes of the cluster do not see.

    Of nodes that have room for work; those that come later are not asked.
    """
    if storage.is_remote(uri):
        return
    folder = storage.absolute(uri)
    if PACKAGES in folder:
        raise BadInput(
            f"{key}: {folder} is in Ray's copy of the working directory, which is deleted with the "
            "job; give s3://..., or the absolute path of a folder that all nodes share"
        )
    here = ray.get_runtime_context().get_node_id()
    others = [n for n in ray.nodes() if n["Alive"] and n["NodeID"] != here and _has_room(n)]
    if not others:
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(prefix=".seen-", dir=folder) as probe:
        blind = _blind(others, probe.name)
    if blind:
        raise BadInput(
            f"{key}: {folder} is a folder of this machine; {len(blind)} of {len(others)} "
            f"other nodes do not see it ({', '.join(blind[:3])}). Give s3://... or a shared folder"
        )


def _blind(nodes: list[dict[str, Any]], path: str) -> list[str]:
    """Addresses of the nodes on which there is no such file."""
    on = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
    asked = [ray.remote(_sees).options(num_cpus=0, scheduling_strategy=one) for one in on]
    seen = ray.get([each.remote(path) for each in asked], timeout=PROBE_S)
    return [n["NodeManagerAddress"] for n, there in zip(nodes, seen, strict=True) if not there]


def _sees(path: str) -> bool:
    return os.path.exists(path)


def _has_room(node: dict[str, Any]) -> bool:
    return node["Resources"].get("CPU", 0) > 0


def num_fitting(workers: Workers, nodes: list[dict[str, Any]]) -> int:
    """How many of such workers the living nodes could hold, were they idle."""
    return sum(_on(workers, node["Resources"]) for node in nodes if node["Alive"])


def describe_lack(workers: Workers, count: int, fitting: int, nodes: list[dict[str, Any]]) -> str:
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    cpus, gpus = (sum(node.get(name, 0) for node in alive) for name in ("CPU", "GPU"))
    largest = max((node.get("CPU", 0) for node in alive), default=0)
    places = "1 node" if len(alive) == 1 else f"{len(alive)} nodes (of up to {largest:g} CPUs)"
    asked = f"{workers.num_cpus:g} CPUs and {workers.num_gpus:g} GPUs"
    each = f"a worker asks for {asked}" if count == 1 else f"{count} workers ask for {asked} each"
    rest = f", which holds {fitting} of them" if fitting else ", which holds none"
    return f"{each}; there is {cpus:g} CPUs and {gpus:g} GPUs on {places}{rest}"


def _on(workers: Workers, resources: Mapping[str, float]) -> int:
    return int(min(resources.get(k, 0) / wanted for k, wanted in _asked(workers).items()) + 1e-9)


def _asked(workers: Workers) -> dict[str, float]:
    asked = {"CPU": workers.num_cpus, "GPU": workers.num_gpus}
    return {name: wanted for name, wanted in asked.items() if wanted > 0}


def _way_out(workers: Workers) -> str:
    if workers.num_gpus:
        return "ask for less with workers.num_gpus (0 to work on CPUs) or workers.num_cpus"
    return "ask for less with workers.num_cpus or workers.min"
