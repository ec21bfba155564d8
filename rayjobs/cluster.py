"""The Ray session of a job, and the error of a failed worker.

Owns which cluster is used and when it is shut down. Knows nothing of what runs there. Ray takes a
good part of a second to import, and is imported only where a session opens: a preview has none.
"""

import logging
import math
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from typing import Any

from rayjobs.config import BadInput, JobFailed
from rayjobs.storage import StorageError

ANSWER_S = 5.0
REMEMBER_ADDRESS = {"worker_process_setup_hook": "rayjobs.cluster.remember_address"}
"""The runtime environment of a cluster beside which there may be another one on the machine."""
LAST_WORDS = (
    "error: this process was ended, or the Ray cluster that it was part of; what is finished is "
    "kept; the same command continues"
)
MAX_LINES_KEPT = 1000
_told: deque[str] = deque(maxlen=MAX_LINES_KEPT)
"""What Ray said of failures of this session's workers."""
_owned = False
"""Whether a session of this process's own is open."""


@contextmanager
def session(num_cpus: float) -> Generator[None]:
    """The cluster that RAY_ADDRESS or a surrounding job names, else a local one, shut down after.

    A local one has at least `num_cpus`; where the machine has fewer, workers share them.
    """
    for name in ("ray", "ray.data", "ray.train"):
        # What they say of a worker's failure is in Ray's logs; the failure itself is raised.
        logging.getLogger(name).setLevel(logging.CRITICAL)
    import ray

    global _owned
    own, first = is_own(), not ray.is_initialized()
    if first:
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if own:
            cpus = max(os.cpu_count() or 1, math.ceil(num_cpus) + 1)
            quiet |= local(cpus)
        start(quiet)
    _owned = _owned or own
    try:
        with _last_words() if first else nullcontext():
            yield
    finally:
        if own:
            _owned = False
            ray.shutdown()


@contextmanager
def _last_words() -> Generator[None]:
    """Have a shell say that this process is no more, if it ends before this context does.

    Ray's C++ ends a driver without a word when its node or the head is gone.
    """
    words = ["sh", "-c", 'read -r _ || echo "$0" >&2', LAST_WORDS]
    # Out of reach of Ctrl-C, which the whole group hears.
    heir = subprocess.Popen(words, stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield
    finally:
        heir.communicate(b"\n")


def local(num_cpus: int) -> dict[str, Any]:
    """What starts a cluster of this process's own, for `ray.init`.

    Ray Train ends a training whose controller is not alive, and asks the dashboard. That of another
    cluster on this machine has never heard of it. So workers ask their own cluster, and its address
    of a dashboard, which it has even without one, is not the usual one, where the other's may be.
    """
    return {
        "address": "local",
        "num_cpus": num_cpus,
        "include_dashboard": False,
        "dashboard_port": _free_port(),
        "runtime_env": dict(REMEMBER_ADDRESS),
    }


def remember_address() -> None:
    """In a worker: Ray's state API is to ask this cluster, not the one that was started last."""
    import ray

    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address


def is_owned() -> bool:
    """Whether nobody else can bring nodes: the open session's cluster is this process's own."""
    return _owned


def is_own() -> bool:
    """Whether the session will be, or is, a local one that only this job uses."""
    ray = sys.modules.get("ray")
    is_joined = ray is not None and ray.is_initialized()
    return not is_joined and not os.environ.get("RAY_ADDRESS")


def unwrap_error(error: Exception) -> Exception:
    """The worker's own error inside one of Ray's, as BadInput or JobFailed."""
    for kind in (BadInput, StorageError):
        pattern = rf"{kind.__module__}\.\w+: (.+?)(?=\n\n|\nFailed to apply|\Z)"
        messages = re.findall(pattern, str(error), re.DOTALL)
        if messages:
            return BadInput(messages[-1]) if kind is BadInput else JobFailed(messages[-1])
    _keep_details(error)
    lines = [line for line in str(error).splitlines() if re.match(r"\S*(Error|Exception)\b", line)]
    reason = lines[-1] if lines else str(error).strip().splitlines()[-1]
    return JobFailed(reason.removeprefix("rayjobs.diffusion.faults."))


def _remember(data: dict[str, Any], ignore_prefix: bool = False) -> None:
    _told.extend(data["lines"])


def _keep_details(error: Exception) -> None:
    """All that Ray says of a failure, in a file: the one line that is told names it."""
    with tempfile.NamedTemporaryFile(
        "w", prefix="rayjobs-", suffix=".log", delete=False, encoding="utf-8"
    ) as file:
        file.write("\n".join([*_told, f"{error}\n"]))
    print(f"details of the failure are in {file.name}", file=sys.stderr)


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def check_answers(address: str) -> None:
    """Raise BadInput within seconds when no Ray answers there: Ray itself would try for minutes.

    "auto" is the cluster that was started last on this machine; it may have been killed.
    """
    if address == "auto":
        from ray._private.utils import read_ray_address

        address = read_ray_address() or address
    place = address.removeprefix("ray://")
    host, _, port = place.rpartition(":")
    if not port.isdecimal():
        return
    try:
        with socket.create_connection((host.strip("[]"), int(port)), ANSWER_S):
            pass
        told = _code_of_an_answer(place)
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
    else:
        if told in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
            raise BadInput(
                f"the cluster at {address} does not let this process in; set RAY_AUTH_MODE=token "
                "and RAY_AUTH_TOKEN to its token"
            )
        # The port of Ray Client does not know this question.
        if told == "OK" or (told == "UNIMPLEMENTED" and place != address):
            return
        reason = f"something listens there, but no Ray: {told.lower().replace('_', ' ')}"
    raise BadInput(
        f"Ray's address is {address}, where no cluster answers ({reason}); start it, correct the "
        "address, or unset RAY_ADDRESS to use this machine alone"
    )


def _code_of_an_answer(place: str) -> str:
    """What comes of asking whether nodes are alive, by gRPC's name."""
    import grpc
    from ray._private.grpc_utils import init_grpc_channel
    from ray.exceptions import AuthenticationError

    try:
        with init_grpc_channel(place) as channel:
            ask = channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")
            ask(b"", timeout=ANSWER_S, wait_for_ready=True)
    except grpc.RpcError as error:
        failed: Any = error
        return str(failed.code().name)
    except AuthenticationError:  # no token here
        return "UNAUTHENTICATED"
    return "OK"


def _refusal(error: Exception) -> str:
    """Why Ray does not start or let this process in, in one line."""
    from ray.exceptions import AuthenticationError

    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if "AF_UNIX" in str(error):
        return f"Ray cannot start: {first}; set RAY_TMPDIR to a short path, such as /tmp"
    if isinstance(error, AuthenticationError):
        return f"the cluster asks for a token: {first}; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
    return f"Ray cannot start: {first}"


def start(options: dict[str, Any]) -> None:
    """Start or join Ray, as `ray.init`, keeping the caller's SIGTERM handler, which Ray replaces.

    Raises BadInput, within seconds, when that cannot be.
    """
    import ray
    from ray._private import worker as ray_worker

    from rayjobs import noise

    on_term = signal.getsignal(signal.SIGTERM)
    if options.get("address") != "local":
        check_answers(os.environ.get("RAY_ADDRESS") or options.get("address", ""))
    # Ray prints the whole traceback of every worker's failure, whatever `log_to_driver` is.
    ray_worker.print_to_stdstream = _remember  # ty: ignore[invalid-assignment]
    try:
        with noise.quiet():
            ray.init(**options)
    except Exception as error:  # where a node does not come up in time, Ray raises a bare one
        raise BadInput(_refusal(error)) from None
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_term)
