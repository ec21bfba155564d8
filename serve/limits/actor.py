"""The shared counts as an actor of the cluster, one for each application.

Owns its name and its life: whichever ingress replica misses it starts it again, with full buckets,
and without replicas it ends itself. Knows nothing of what is counted.
"""

import asyncio
from collections.abc import Mapping
from typing import Any

import ray

from serve.limits.counts import Counts, Lease
from serve.limits.keeper import Ask

NAMESPACE = "rayjobs"
LOOK_EVERY_S, UNUSED_S = 10.0, 60.0


class SharedCounts:
    """`Counts` for callers in other processes."""

    def __init__(self) -> None:
        self.counts = Counts()
        self.counts.report("", {})
        self._end: asyncio.Task[None] | None = None

    async def report(self, replica: str, active: Mapping[str, int]) -> None:
        self._end = self._end or asyncio.create_task(self._end_unused())
        self.counts.report(replica, active)

    async def enter(self, replica: str, name: str, active: int, most: int) -> bool:
        return self.counts.enter(replica, name, active, most)

    async def take(self, name: str, images: float, per_minute: float, ahead: float) -> Lease:
        return self.counts.take(name, images, per_minute, ahead)

    async def _end_unused(self) -> None:
        while self.counts.silent_s() < UNUSED_S:
            await asyncio.sleep(LOOK_EVERY_S)
        ray.kill(ray.get_runtime_context().current_actor)


def name_of(application: str) -> str:
    return f"limits of {application}"


def connect(application: str) -> Ask:
    """The shared counts of an application, started where there are none. Waits: use a thread."""
    # It belongs to no replica, so that it outlives each, and takes no CPU, so that it always fits.
    actor: Any = ray.remote(SharedCounts).options(
        name=name_of(application),
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        max_concurrency=1000,
    )
    handle = actor.remote()
    return lambda method, *args: getattr(handle, method).remote(*args)
