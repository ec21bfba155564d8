"""An engine replica: the engine loop, wrapped for Ray Serve.

Owns what Serve calls: events of a request, health, load, models in memory. The loop does the work.
The engine is imported where a replica begins: whoever deploys it imports this module, too, and
needs no torch.
"""

import asyncio
import os
import resource
import sys
from collections.abc import AsyncIterator
from typing import Any

from ray import serve as ray_serve

from serve.config import ServeConfig
from serve.protocol import Event, ImagesRequest
from serve.registry import Registry
from serve.router.autoscaling import PENDING


class EngineReplica:
    """Answers requests; models with `preload` are loaded and warm before the first one."""

    async def __init__(self, config: ServeConfig):
        import torch

        from serve.engine import memory, safety
        from serve.engine.loop import EngineLoop

        self.config = config
        if not torch.cuda.is_available():
            cores = config.engine.num_threads or max(1, int(config.scaling.num_cpus))
            torch.set_num_threads(min(cores, os.cpu_count() or 1))
        memory.keep_to_share(config.scaling.num_gpus)
        self.registry = Registry(config)
        self.loop = EngineLoop(config.engine, self.registry, safety=safety.build(config.safety))
        self._end = asyncio.create_task(self._end_with_engine())
        self.registry.watch()
        for model in config.models:
            if model.preload:
                await self.loop.warm_up(model.name)

    async def generate(self, request: ImagesRequest) -> AsyncIterator[Event]:
        async for event in self.loop.generate(request):
            yield event

    async def state(self) -> dict[str, Any]:
        """Models in memory, pending work and metrics, for `/v1/models`, `/ready` and `/metrics`."""
        return {
            "replica": ray_serve.get_replica_context().replica_tag,
            "names": self.loop.names(),
            "facts": self.loop.facts(),
            "load": self.loop.load(),
            "pending_s": self.loop.pending_s(),
            "metrics": self.loop.metrics.text(),
            "peak_kb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
            "pid": os.getpid(),
        }

    async def record_autoscaling_stats(self) -> dict[str, float]:
        return {PENDING: self.loop.pending_s()}

    async def record_routing_stats(self) -> dict[str, Any]:
        return {"names": self.loop.names(), "pending_s": self.loop.pending_s()}

    async def _end_with_engine(self) -> None:
        """End the process when its engine fails: its requests are then sent to another replica."""
        while self.loop.failure is None:
            await asyncio.sleep(0.5)
        print(f"the engine failed: {self.loop.failure!r}", file=sys.stderr, flush=True)
        os._exit(1)
