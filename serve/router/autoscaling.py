"""How many engine replicas to run: by seconds of pending work, not by the number of requests.

Owns the policy. Delays, bounds and scaling up from zero are Serve's.
"""

import math
from typing import Any

from ray.serve.config import AutoscalingContext

PENDING = "pending_s"


class PendingWorkPolicy:
    """One replica for every `target_s` seconds of denoising work that waits or is in progress."""

    def __init__(self, target_s: float):
        self.target_s = target_s

    def __call__(self, ctx: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        by_replica: dict[Any, float] = (ctx.aggregated_metrics or {}).get(PENDING, {})
        wanted = math.ceil(sum(by_replica.values()) / self.target_s)
        return max(wanted, 1 if ctx.total_num_requests > 0 else 0), {}
