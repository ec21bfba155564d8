"""The application: an ingress and the engine replicas behind it, put together for Ray Serve.

Owns how each is deployed. `serve run configs/serve.yaml` calls `build`.
"""

from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray import serve as ray_serve
from ray.serve import Application
from ray.serve.context import _get_global_client

from rayjobs import storage
from rayjobs.config import BadInput
from serve.config import ServeConfig
from serve.ingress.api import create_app
from serve.ingress.auth import is_loopback
from serve.registry import Registry
from serve.router.fleet import Fleet

MOST_ONGOING = 4096
"""Asks on one replica: the engine's own queue is the one that counts, and where 429 comes from."""
SPARE_S = 30.0
"""A replica that is to end has the longest deadline and this to finish what it has."""


deployment: Any = ray_serve.deployment


@ray_serve.ingress()
class Ingress:
    """HTTP, uploads and picture formats; no torch."""

    def __init__(self, config: ServeConfig, engine: Any):
        self.config = config
        self.fleet = Fleet(engine)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self.config, self.fleet, stamps_ids=False)


def build(args: ServeConfig) -> Application:
    """The application of a configuration. Raises BadInput for what cannot be served."""
    config = anchored(args)
    refuse_open_door(config)
    Registry(config)  # what is named must be there, before a replica starts
    scaling, longest_s = config.scaling, config.limits.max_deadline_s
    ingress = deployment(Ingress).options(
        num_replicas=scaling.ingress,
        ray_actor_options={"num_cpus": scaling.ingress_cpus},
        max_ongoing_requests=MOST_ONGOING,
        graceful_shutdown_timeout_s=longest_s + 2 * SPARE_S,
        graceful_shutdown_wait_loop_s=0.5,
    )
    bound: Application = ingress.bind(config, _engine(config).bind(config))
    return bound


def _engine(config: ServeConfig) -> Any:
    # Here, not above: this module is the ingress's too, which loads no torch.
    from serve.replica import EngineReplica

    scaling = config.scaling
    return deployment(EngineReplica).options(
        name="Engine",
        ray_actor_options={"num_cpus": scaling.num_cpus, "num_gpus": scaling.num_gpus},
        max_ongoing_requests=MOST_ONGOING,
        graceful_shutdown_timeout_s=config.limits.max_deadline_s + SPARE_S,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=5.0,
        autoscaling_config={
            "min_replicas": scaling.min,
            "max_replicas": scaling.max,
            "upscale_delay_s": scaling.upscale_delay_s,
            "downscale_delay_s": scaling.downscale_delay_s,
            "metrics_interval_s": 1.0,
            "look_back_period_s": 5.0,
            "policy": {
                "policy_function": "serve.router.autoscaling:BySeconds",
                "policy_kwargs": {"target_s": scaling.target_s},
            },
        },
        request_router_config={
            "request_router_class": "serve.router.affinity:HoldsModel",
            "request_routing_stats_period_s": 1.0,
        },
    )


def anchored(config: ServeConfig) -> ServeConfig:
    """The same, whatever the working directory of the processes that read it."""

    def anchor(part: Any) -> Any:
        is_path = part.uri is not None and Path(part.uri).exists()
        return part.model_copy(update={"uri": storage.absolute(part.uri)}) if is_path else part

    changed: dict[str, Any] = {
        "models": tuple(map(anchor, config.models)),
        "loras": tuple(map(anchor, config.loras)),
        "registry": anchor(config.registry),
        "safety": anchor(config.safety),
    }
    return config.model_copy(update=changed)


def refuse_open_door(config: ServeConfig) -> None:
    """Raise BadInput where all the world could ask without a key."""
    if config.auth.keys or config.auth.allow_anyone:
        return
    client = _get_global_client(raise_if_no_controller_running=False)
    host = None if client is None else client.http_config.host
    if host is not None and not is_loopback(host):
        raise BadInput(
            f"http_options.host is {host}, which others can reach, but auth.keys is empty; give "
            "keys, or host 127.0.0.1, or auth.allow_anyone where the network is closed"
        )
