"""Ray workers that start in a second: forks of one process that has the libraries loaded.

Most of a small job's time is the import of torch, diffusers and Lightning by each of its processes.
Ray starts this file in the place of its own `setup_worker.py`. It hands its arguments, environment
and output to the server, which forks, and it ends as that fork ends. What runs in a worker, and how
Ray starts, watches and ends it, is as ever.
"""

import argparse
import array
import atexit
import gc
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

SOCKET = "RAYJOBS_TESTS_WARM_SOCKET"
MODULES = (
    *("aiohttp", "botocore.session", "fastapi", "google.protobuf.descriptor_pb2", "grpc"),
    *("opentelemetry.sdk.metrics", "pandas", "pyarrow.dataset", "s3fs", "uvicorn", "uvloop"),
    *("diffusers.loaders", "peft", "pytorch_lightning", "tqdm.auto"),
    *("rayjobs.diffusion.engine", "rayjobs.models.loading"),
)
"""Not Ray: as it is imported it reads the variables that tell a worker its job."""
NO_THREADS = {"OPENBLAS_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
"""What a thread holds when its process forks stays locked, so no library may begin one."""
POLL_S = 0.1
LOAD_S = 120.0
"""For the server to load all of `MODULES`, on a busy machine."""
_servers: list[subprocess.Popen[bytes]] = []
"""Whose end nobody waits for."""


@contextmanager
def warm_workers(folder: Path) -> Generator[None]:
    """Meanwhile the workers of clusters after `use_warm_workers` are forks.

    Processes that test beside each other give the same folder and share the server, which ends
    with the process that started them.
    """
    path, owner = str(folder / "warm"), os.getpid()
    if "PYTEST_XDIST_WORKER" in os.environ:
        owner = os.getppid()
    with suppress(FileExistsError):
        folder.mkdir()
        # The raylet knows the file by the end of its name.
        (folder / "setup_worker.py").symlink_to(__file__)
        command = [sys.executable, __file__, "serve", path, str(owner)]
        nowhere = subprocess.DEVNULL
        _servers.append(subprocess.Popen(command, stdin=nowhere, env=os.environ | NO_THREADS))
    os.environ[SOCKET] = path
    try:
        yield
    finally:
        del os.environ[SOCKET]


def use_warm_workers() -> None:
    """Have clusters that this process starts use the server, where there is one."""
    from ray._private import ray_constants

    if path := os.environ.get(SOCKET):
        # Ray joins the name to a folder's path, which an absolute one replaces.
        ray_constants.SETUP_WORKER_FILENAME = str(Path(path).with_name("setup_worker.py"))


def serve(path: str, owner: int) -> None:
    """Fork for every connection, as long as the owner lives; then end all forks."""
    for module in MODULES:
        __import__(module)
    assert "ray" not in sys.modules
    assert len(os.listdir("/proc/self/task")) == 1
    gc.freeze()
    forks: dict[int, socket.socket] = {}
    with socket.socket(socket.AF_UNIX) as listener, selectors.DefaultSelector() as selector:
        listener.bind(f"{path}.new")
        listener.listen(64)
        os.rename(f"{path}.new", path)
        selector.register(listener, selectors.EVENT_READ)
        while Path(f"/proc/{owner}").exists():
            for key, _ in selector.select(POLL_S):
                if key.fileobj is not listener:  # Ray has killed what stands for a fork
                    selector.unregister(key.fileobj)
                    with suppress(ProcessLookupError):
                        os.kill(key.data, signal.SIGKILL)
                    continue
                connection, _ = listener.accept()
                pid = _fork(connection, [listener, *forks.values()])
                forks[pid] = connection
                selector.register(connection, selectors.EVENT_READ, pid)
            _reap(forks, selector)
    _end(forks)


def _fork(connection: socket.socket, others: list[socket.socket]) -> int:
    data, descriptors, _, _ = socket.recv_fds(connection, 1 << 20, 2)
    asked = json.loads(data)
    if pid := os.fork():
        for descriptor in descriptors:
            os.close(descriptor)
        return pid
    for each in (connection, *others):
        each.close()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, descriptor in enumerate(descriptors, start=1):
        os.dup2(descriptor, number)
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    sys.argv = asked["arguments"]
    code = 1
    try:
        _enter_runtime_environment()
        sys.path.insert(0, str(Path(sys.argv[0]).parent))
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _enter_runtime_environment() -> None:
    """What Ray's `setup_worker.py` does in a process of its own, which loads Ray for that."""
    from ray._private.runtime_env.context import RuntimeEnvContext
    from ray._private.utils import update_envs

    parser = argparse.ArgumentParser()
    parser.add_argument("--serialized-runtime-env-context", default="{}")
    parser.add_argument("--language")
    told, sys.argv = parser.parse_known_args(sys.argv)
    update_envs(RuntimeEnvContext.deserialize(told.serialized_runtime_env_context).env_vars)


def _reap(forks: dict[int, socket.socket], selector: selectors.BaseSelector) -> None:
    while forks:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        connection = forks.pop(pid)
        with suppress(KeyError):
            selector.unregister(connection)
        with suppress(OSError):
            connection.sendall(bytes([os.waitstatus_to_exitcode(status) & 0xFF]))
        connection.close()


def _end(forks: dict[int, socket.socket]) -> None:
    for pid in forks:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def stand_in(arguments: list[str]) -> int:
    """Have a fork run these arguments; the code that it ends with."""
    path = os.environ[SOCKET]
    deadline = time.monotonic() + LOAD_S
    while not os.path.exists(path):  # it is loading
        if time.monotonic() > deadline:
            raise TimeoutError(f"the server of warm workers is not at {path}")
        time.sleep(POLL_S)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        asked = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [1, 2]))
        connection.sendmsg([json.dumps(asked).encode()], [rights])
        code = connection.recv(1)
    return code[0] if code else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        sys.path.insert(0, str(Path(__file__).parents[1]))
        serve(sys.argv[2], int(sys.argv[3]))
    else:
        raise SystemExit(stand_in(sys.argv[1:]))
