"""Model affinity: a request goes to an engine replica that has its model, unless that one is busy.

Owns that ranking. Replicas report their models and pending work about every second; among replicas
of one rank, Serve's own count of requests decides.
"""

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

SPILL_S = 15.0
"""How much more work than the idlest a replica with the model may have: about a model load."""


class ModelAffinityRouter(RequestRouter):
    """Names of models and adapters come as the multiplexed model id, separated by commas."""

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """The candidates by rank, the best first."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # when all replicas are full
        wanted = []
        if pending_request is not None and pending_request.metadata.multiplexed_model_id:
            wanted = pending_request.metadata.multiplexed_model_id.split(",")
        idlest_s = min((_pending_s(each) for each in candidate_replicas), default=0.0)
        ranks: dict[int, list[RunningReplica]] = {}
        for replica in candidate_replicas:
            held = set(replica.routing_stats.get("names", ())) & set(wanted)
            is_overloaded = _pending_s(replica) > idlest_s + SPILL_S
            ranks.setdefault(-1 if is_overloaded else len(held), []).append(replica)
        return [ranks[rank] for rank in sorted(ranks, reverse=True)]


def _pending_s(replica: RunningReplica) -> float:
    return float(replica.routing_stats.get("pending_s", 0.0))
