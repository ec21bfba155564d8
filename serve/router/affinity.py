"""Which engine replica an ask goes to: one that holds its model, unless that has far more to do.

Owns that choice. What a replica holds and has to do it says itself, every second or so; between
two such words Serve's own count of requests decides.
"""

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

SPILL_S = 15.0
"""How much more work than the idlest has one replica may, for holding the model: about a load."""


class HoldsModel(RequestRouter):
    """The names wanted come as the call's multiplexed model id, separated by commas."""

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Candidates in ranks, the best rank first."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # when all of them are full
        wanted = []
        if pending_request is not None and pending_request.metadata.multiplexed_model_id:
            wanted = pending_request.metadata.multiplexed_model_id.split(",")
        idlest_s = min((_pending_s(each) for each in candidate_replicas), default=0.0)
        ranks: dict[int, list[RunningReplica]] = {}
        for replica in candidate_replicas:
            held = set(replica.routing_stats.get("names", ())) & set(wanted)
            is_swamped = _pending_s(replica) > idlest_s + SPILL_S
            ranks.setdefault(-1 if is_swamped else len(held), []).append(replica)
        return [ranks[rank] for rank in sorted(ranks, reverse=True)]


def _pending_s(replica: RunningReplica) -> float:
    return float(replica.routing_stats.get("pending_s", 0.0))
