"""A server from its file to its end: started, watched until it is ready, drained, shut down.

Owns the Ray session of `python -m serve`. Ray's own `serve run` cuts requests when it ends and goes
on when an application cannot start; this does neither.
"""

import logging
import os
import re
import time
from collections.abc import Callable
from typing import Any, NoReturn

import ray
from ray import serve as ray_serve
from ray._private import worker as ray_worker
from ray.serve.context import _get_global_client
from ray.serve.schema import ApplicationStatus, ServeDeploySchema

from rayjobs import cluster
from rayjobs.config import BadInput, JobFailed
from serve.app import check, with_absolute_paths
from serve.file import ServeFile, check_port

LOOK_EVERY_S = 0.5
QUIET: dict[str, Any] = {
    "log_to_driver": False,
    "logging_level": logging.ERROR,
    "namespace": "serve",
}
DRAIN_MARGIN_S = 15.0
"""Over the longest deadline: a last answer is still encoded and sent."""
FAILED = (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY)
INGRESS = "Ingress"
"""The deployment that takes requests in."""


class Server:
    """The applications of a file on a Ray cluster: RAY_ADDRESS's, else one of its own."""

    def __init__(self, file: ServeFile, values: dict[str, Any]):
        self.file = file
        self.values = values
        self.is_own = not os.environ.get("RAY_ADDRESS")
        self._is_started = False

    def check(self) -> None:
        """Raise BadInput, or StorageError, for what can be known to fail before anything starts."""
        for app in self.file.applications:
            check(with_absolute_paths(app.args))
        if self.is_own:
            check_port(self.file.http_options.host, self.file.http_options.port)

    def start(self) -> None:
        """Start the applications. Raises BadInput, or JobFailed where one cannot start."""
        for name in ("ray", "ray.serve"):
            logging.getLogger(name).setLevel(logging.ERROR)
        # Without an address Ray would join what runs on this machine, or wait for what ran there.
        own = {"address": "local"} if self.is_own else {}
        cluster.start({**QUIET, **own})
        if _get_global_client(raise_if_no_controller_running=False) is not None:
            raise BadInput(
                "Ray Serve runs on this cluster already; use `serve deploy` to change it"
            )
        schema = ServeDeploySchema.model_validate(self._values_anywhere())
        self._is_started = True
        http = schema.http_options.model_dump()
        ray_serve.start(schema.proxy_location, http, tracing_config=schema.tracing_config)
        client = _get_global_client()
        assert client is not None
        client.deploy_apps(schema, _blocking=False)
        while not self._is_ready():
            time.sleep(LOOK_EVERY_S)
        client.wait_for_proxies_serving(wait_for_applications_running=True)

    def _values_anywhere(self) -> dict[str, Any]:
        """The file's values with absolute local paths: they are built in another process."""
        apps = []
        for app, given in zip(self.file.applications, self.values["applications"], strict=True):
            args = with_absolute_paths(app.args).model_dump(mode="json", exclude_unset=True)
            apps.append({**given, "args": args})
        return {**self.values, "applications": apps}

    def _is_ready(self) -> bool:
        apps = ray_serve.status().applications
        for name, app in apps.items():
            if app.status in FAILED:
                messages = [app.message, *(each.message for each in app.deployments.values())]
                reason = reason_in(messages)
                raise JobFailed(f"application {name} cannot start: {reason} (logs: {_logs()})")
        states = [app.status for app in apps.values()]
        return len(states) == len(self.file.applications) and set(states) == {
            ApplicationStatus.RUNNING
        }

    def wait(self) -> NoReturn:
        """Until an interruption."""
        while True:
            time.sleep(LOOK_EVERY_S)

    def stop(self) -> None:
        """End at once what was started; a cluster of its own goes with it."""
        if self._is_started and not self.is_own:
            ray_serve.shutdown()
        ray.shutdown()


def drain(longest_s: float, tell: Callable[[int], None] = lambda active: None) -> int:
    """Refuse new requests for images and wait for those in progress, at most `longest_s`.

    `tell` is called with their number at first. Returns how many are left.
    """
    until_s, is_told = time.monotonic() + longest_s + DRAIN_MARGIN_S, False
    names = [n for n, app in ray_serve.status().applications.items() if INGRESS in app.deployments]
    handles = [ray_serve.get_app_handle(name) for name in names]
    while True:
        active = sum(n for handle in handles for n in handle.broadcast("drain").results())
        if active and not is_told:
            tell(active)
            is_told = True
        if not active or time.monotonic() > until_s:
            return active
        time.sleep(LOOK_EVERY_S)


def reason_in(messages: list[str]) -> str:
    """What is told to a person of Ray's account of a failure, a traceback among it."""
    text = "\n".join(messages)
    own = re.findall(r"(?:BadInput|StorageError|Unavailable|NotThere): (.+)", text)
    errors = re.findall(r"^\S*(?:Error|Exception): .+", text, re.MULTILINE)
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return str((own or errors or lines or ["no reason was given"])[-1]).strip()


def _logs() -> str:
    node = ray_worker._global_node
    return f"{node.get_session_dir_path()}/logs/serve" if node else "on the cluster's nodes"
