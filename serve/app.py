"""The Ray Serve application: an ingress, and the engine replicas behind it.

Owns how each is deployed. Ray calls `build` with the `args` of a file.
"""

import contextlib
import ctypes
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray import serve as ray_serve
from ray.serve import Application
from ray.serve.context import _get_global_client

from rayjobs import storage
from rayjobs.config import BadInput
from rayjobs.provenance.marks import load_signing
from rayjobs.storage import StorageError
from serve.config import ServeConfig
from serve.file import check_public
from serve.ingress.api import create_app
from serve.ingress.images_api import ImagesApi
from serve.limits.actor import connect
from serve.limits.keeper import Ask, Limits
from serve.registry import Registry
from serve.replica import EngineReplica
from serve.router.fleet import Fleet

MAX_ONGOING_REQUESTS = 4096
"""Of one replica: the engine's own queue decides when to answer 429, so this is never reached."""
SHUTDOWN_MARGIN_S = 30.0
"""A replica that is stopped has this and the longest deadline to finish its requests."""
RESULTS_ANSWER_S = 3.0
"""How long a start waits for the storage of results; it is asked by `serve run` and by Ray."""
M_MMAP_THRESHOLD, LARGE_BYTES = -3, 2**20
"""glibc's option, and the size from which a block of memory is one of its own."""


deployment: Any = ray_serve.deployment


@ray_serve.ingress()
class Ingress:
    """HTTP, uploads and image formats; no torch."""

    async def __init__(self, config: ServeConfig, engine: Any):
        give_memory_back()
        self.config = config
        limits = Limits(_shared_counts(config))
        self.api = ImagesApi(config, Fleet(engine), limits)
        await limits.start()

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self.config, self.api, adds_ids=False)

    async def drain(self) -> int:
        """From now on refuse requests for images; return how many are still being answered."""
        self.api.is_draining = True
        return self.api.active


def _shared_counts(config: ServeConfig) -> Callable[[], Ask] | None:
    """How limits are counted over all ingress replicas, where there are several."""
    if not config.auth.keys or config.scaling.ingress == 1:
        return None
    return partial(connect, ray_serve.get_replica_context().app_name)


def give_memory_back() -> None:
    """Let this process return the memory of large uploads at once: glibc would keep it."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)


def build(args: ServeConfig) -> Application:
    """The application of a configuration. Raises BadInput for one that cannot be served."""
    config = with_absolute_paths(args)
    require_auth_if_public(config)
    check(config)
    scaling, longest_s = config.scaling, config.limits.max_deadline_s
    ingress = deployment(Ingress).options(
        num_replicas=scaling.ingress,
        ray_actor_options={"num_cpus": scaling.ingress_cpus},
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        graceful_shutdown_timeout_s=longest_s + 2 * SHUTDOWN_MARGIN_S,
        graceful_shutdown_wait_loop_s=0.5,
    )
    bound: Application = ingress.bind(config, _engine(config).bind(config))
    return bound


def check(config: ServeConfig) -> None:
    """Raise BadInput for models that are not there, keys that do not sign, results not stored."""
    Registry(config)
    load_signing(config.provenance)
    if config.results.uri is not None:
        try:
            storage.check(config.results.uri, write=True, timeout_s=RESULTS_ANSWER_S)
        except storage.Unavailable as error:  # it may be back when a link is asked for
            logging.getLogger("rayjobs").warning("results.uri: %s", error)
        except StorageError as error:
            raise BadInput(f"results.uri: {error}") from None


def _engine(config: ServeConfig) -> Any:
    scaling = config.scaling
    return deployment(EngineReplica).options(
        name="Engine",
        ray_actor_options={"num_cpus": scaling.num_cpus, "num_gpus": scaling.num_gpus},
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        graceful_shutdown_timeout_s=config.limits.max_deadline_s + SHUTDOWN_MARGIN_S,
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
                "policy_function": "serve.router.autoscaling:PendingWorkPolicy",
                "policy_kwargs": {"target_s": scaling.target_s},
            },
        },
        request_router_config={
            "request_router_class": "serve.router.affinity:ModelAffinityRouter",
            "request_routing_stats_period_s": 1.0,
        },
    )


def with_absolute_paths(config: ServeConfig) -> ServeConfig:
    """The configuration with absolute local paths: replicas have other working directories."""

    def absolute(part: Any) -> Any:
        places = {key: getattr(part, key, None) for key in ("uri", "encoder")}
        paths = {key: place for key, place in places.items() if place and Path(place).exists()}
        return part.model_copy(update={key: storage.absolute(it) for key, it in paths.items()})

    changed: dict[str, Any] = {
        "models": tuple(map(absolute, config.models)),
        "loras": tuple(map(absolute, config.loras)),
        "controls": tuple(map(absolute, config.controls)),
        "ip_adapters": tuple(map(absolute, config.ip_adapters)),
        "registry": absolute(config.registry),
        "safety": absolute(config.safety),
    }
    return config.model_copy(update=changed)


def require_auth_if_public(config: ServeConfig) -> None:
    """Raise BadInput when other machines could use the API without a key."""
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is not None and client.http_config.host is not None:
        check_public(client.http_config.host, config)
