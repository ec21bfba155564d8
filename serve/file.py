"""The file that a server is started with: Ray Serve's own, with applications of this package.

Owns what can be wrong with it before anything starts. Ray checks its own keys; those of
applications are checked here, so that a mistake is one line and not the end of a log.
"""

import contextlib
import errno
import ipaddress
import socket
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field

from rayjobs.config import BadInput, Config, load_config
from serve.config import ServeConfig
from serve.tracing import check as check_exporter

BUILDER = "serve.app:build"


class HttpOptions(Config):
    """Ray Serve's `http_options`; those that are not here are Ray's to check."""

    model_config = ConfigDict(extra="allow")

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    ssl_certfile: str | None = None


class ApplicationFile(Config):
    """One of Ray Serve's `applications`."""

    model_config = ConfigDict(extra="allow")

    name: str = "default"
    import_path: str
    args: ServeConfig


class TracingFile(Config):
    """Ray Serve's `tracing_config`."""

    model_config = ConfigDict(extra="allow")

    enabled: bool = True
    exporter_import_path: str = ""
    """Ray's own without it: a file of spans beside Serve's logs."""


class ServeFile(Config):
    model_config = ConfigDict(extra="allow")

    tracing_config: TracingFile | None = None

    http_options: HttpOptions = HttpOptions()
    applications: tuple[ApplicationFile, ...]

    @property
    def url(self) -> str:
        scheme = "https" if self.http_options.ssl_certfile else "http"
        host = self.http_options.host
        if host in ("0.0.0.0", "::"):
            host = socket.gethostname()
        return f"{scheme}://{host}:{self.http_options.port}"

    @property
    def longest_s(self) -> float:
        """Seconds that a request may take at most."""
        return max(app.args.limits.max_deadline_s for app in self.applications)


def load(path: str, overrides: list[str] | None = None) -> tuple[ServeFile, dict[str, Any]]:
    """A file's checked values, and all of its values for Ray. Raises BadInput."""
    from ray.serve.schema import ServeDeploySchema

    if not Path(path).is_file():
        raise BadInput(f"{path}: there is no such file")
    file = load_config(ServeFile, path, overrides)
    if not file.applications:
        raise BadInput(f"{path}: applications is empty; `rayjobs init serve` writes an example")
    for app in file.applications:
        if app.import_path != BUILDER:
            raise BadInput(
                f"{path}: import_path {app.import_path} is not {BUILDER}; start others by Ray's "
                "own `serve run`"
            )
        check_public(file.http_options.host, app.args)
    tracing = file.tracing_config
    if tracing is not None and tracing.enabled and tracing.exporter_import_path:
        check_exporter(tracing.exporter_import_path)
    values = file.model_dump(mode="json", exclude_unset=True)
    try:
        ServeDeploySchema.model_validate(values)
    except ValueError as error:
        raise BadInput(f"{path}: {' '.join(str(error).split())}") from None
    return file, values


def check_public(host: str, config: ServeConfig) -> None:
    """Raise BadInput when other machines could use the API without a key."""
    if not (config.auth.keys or config.auth.allow_anyone or is_loopback(host)):
        raise BadInput(
            f"http_options.host is {host}, which other machines can reach, but auth.keys is empty; "
            "set auth.keys, or host 127.0.0.1, or auth.allow_anyone on a private network"
        )


def check_port(host: str, port: int) -> None:
    """Raise BadInput when somebody listens there: Ray's servers would share the port silently."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen()
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                reason = "is taken; end what listens there, or set another http_options.port"
            else:
                reason = f"on {host} cannot be used: {error.strerror or error}"
            raise BadInput(f"port {port} {reason}") from None


def is_loopback(host: str | None) -> bool:
    if host == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host or "").is_loopback
    return False
