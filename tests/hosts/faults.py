"""What befalls two hosts and their storage in the middle of a job.

Owns the faults and what is told of the seconds they cost. Knows no job.
"""

import itertools
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from tests.hosts.cluster import Cluster
from tests.hosts.proxy import Proxy

CUT_S, AWAY_S = 20.0, 30.0
SHARE = 0.05
"""Of requests, those that fail, and those that are slow."""


@dataclass
class Hosts:
    """What a fault may take hold of, and when it did."""

    cluster: Cluster
    proxy: Proxy
    began: float = 0.0
    """Unix seconds at which the fault began."""
    dead: float | None = field(default=None)
    """When Ray declared host 2's node dead."""


def cut_for_good(hosts: Hosts) -> None:
    hosts.cluster.network.cut(2)
    hosts.cluster.await_death()
    hosts.dead = time.time()


def cut_and_heal(hosts: Hosts) -> None:
    hosts.cluster.network.cut(2)
    time.sleep(CUT_S)
    hosts.cluster.network.heal(2)


def kill_raylet(hosts: Hosts) -> None:
    hosts.cluster.network.kill(2, "raylet")
    hosts.cluster.await_death()
    hosts.dead = time.time()


def storage_goes(hosts: Hosts) -> None:
    hosts.proxy.go_away()
    time.sleep(AWAY_S)
    hosts.proxy.come_back()


def storage_is_frail(hosts: Hosts) -> None:
    """From now on."""
    hosts.proxy.disturb(SHARE)


FAULTS = (cut_for_good, cut_and_heal, kill_raylet, storage_goes, storage_is_frail)


def when(
    ready: Callable[[], bool], fault: Callable[[Hosts], None], hosts: Hosts
) -> threading.Thread:
    """A thread that has the fault happen once all is ready for it."""

    def watch() -> None:
        while not ready():
            time.sleep(0.1)
        hosts.began = time.time()
        fault(hosts)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def tell(name: str, hosts: Hosts, marks: Iterable[float]) -> None:
    """What a fault cost a job whose work was done at these unix seconds."""
    times = sorted(marks)
    gaps = [b - a for a, b in itertools.pairwise(times) if b > hosts.began]
    said = [
        f"{name}: all was done {times[-1] - hosts.began:.0f} s after it began",
        f"the longest pause was {max(gaps, default=0):.1f} s",
    ]
    if hosts.dead is not None:
        later = [t - hosts.dead for t in times if t > hosts.dead]
        said.append(f"the node was declared dead after {hosts.dead - hosts.began:.1f} s")
        said.append(f"and work was done again {min(later, default=0):.1f} s later")
    faults = {fate: count for fate, count in hosts.proxy.seen.items() if fate != "passed"}
    if faults:
        said.append(f"requests to S3: {faults} of {hosts.proxy.seen.total()}")
    print("\n" + "; ".join(said), flush=True)
