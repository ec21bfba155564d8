"""Ray workers that start in a second: forks of one process that has the libraries loaded.

Most of a small job's time is the import of torch, diffusers and Lightning by each of its processes.
Ray starts this file in the place of Python (`py_executable`); it hands its arguments, environment
and output to the server, which forks, and it ends as that fork ends. What runs in a worker, and
how Ray starts, watches and ends it, is as ever.
"""

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
import threading
import time
import traceback
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

SOCKET = "RAYJOBS_TESTS_WARM_SOCKET"
MODULES = ("pytorch_lightning", "peft", "diffusers.loaders", "rayjobs.diffusion.engine")
"""Not Ray, nor pyarrow: they begin threads, and what a thread holds when it forks stays locked."""
POLL_S = 0.1


@contextmanager
def warm_workers(folder: Path) -> Generator[dict[str, str]]:
    """The runtime environment whose workers are forks; they need `SOCKET` in Ray's environment."""
    path = str(folder / "warm")
    command, alone = [sys.executable, __file__, "serve", path], {"OPENBLAS_NUM_THREADS": "1"}
    server = subprocess.Popen(command, stdin=subprocess.PIPE, env=os.environ | alone)
    os.environ[SOCKET] = path
    try:
        while not Path(path).exists():
            assert server.poll() is None
            time.sleep(0.1)
        # -S: this file needs the standard library only, and site would read every .pth file.
        yield {"py_executable": f"{sys.executable} -S -E {__file__}"}
    finally:
        server.communicate()


def serve(path: str) -> None:
    """Fork for every connection, until standard input ends; then end all forks."""
    for module in MODULES:
        __import__(module)
    assert "ray" not in sys.modules
    assert threading.active_count() == 1
    gc.freeze()
    forks: dict[int, socket.socket] = {}
    with socket.socket(socket.AF_UNIX) as listener, selectors.DefaultSelector() as selector:
        listener.bind(path)
        listener.listen(64)
        selector.register(listener, selectors.EVENT_READ)
        selector.register(sys.stdin, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select(POLL_S):
                if key.fileobj is sys.stdin:
                    _end(forks)
                    return
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
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    code = 1
    try:
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
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.environ[SOCKET])
        asked = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [1, 2]))
        connection.sendmsg([json.dumps(asked).encode()], [rights])
        code = connection.recv(1)
    return code[0] if code else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        sys.path.insert(0, str(Path(__file__).parents[1]))
        serve(sys.argv[2])
    else:
        raise SystemExit(stand_in(sys.argv[1:]))
