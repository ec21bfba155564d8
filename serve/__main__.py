"""`python -m serve`: run a server in the foreground, check its file, or drain one.

Owns the commands, the signals and the exit codes: 0 done, 2 a mistake in the file or the place, 1
anything else, 130 stopped at once.
"""

import argparse
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from serve.running import Server

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
DRAIN_S = 600.0
PR_SET_PDEATHSIG = 1


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from rayjobs.config import BadInput, JobFailed
    from rayjobs.storage import StorageError

    for number in (signal.SIGTERM, signal.SIGINT):  # a shell's background job hears no SIGINT else
        signal.signal(number, _interrupt)
    try:
        return int(options.command(options))
    except (BadInput, StorageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except JobFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m serve", description="An image API on Ray Serve, for SDXL and its family."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="serve until Ctrl-C or SIGTERM, then finish requests")
    check = commands.add_parser("check", help="look for mistakes; nothing is started")
    for command, work in ((run, _run), (check, _check)):
        command.add_argument("config", metavar="FILE", help="a YAML file")
        command.add_argument(
            "overrides", nargs="*", metavar="KEY=VALUE", help="as in http_options.port=8001"
        )
        command.set_defaults(command=work)
    run.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    drain = commands.add_parser("drain", help="let a running server refuse requests and finish old")
    drain.add_argument(
        "--seconds", type=float, default=DRAIN_S, help="the longest wait, the longest deadline"
    )
    drain.set_defaults(command=_drain)
    return parser


def _run(options: argparse.Namespace) -> int:
    """Run the server in a session of its own, and pass on what is to end it.

    A shell, `timeout` and others signal a whole process group. Ray's processes would be in it, and
    their end would cut the requests that are still to be answered.
    """
    if options.inside:
        return _run_inside(options)
    command = [sys.executable, "-m", "serve", "run", "--inside", options.config, *options.overrides]
    inside = subprocess.Popen(command, start_new_session=True, preexec_fn=_end_with_parent)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: inside.send_signal(signal.SIGTERM))
    code = inside.wait()
    return code if code >= 0 else FAILED


def _end_with_parent() -> None:
    with contextlib.suppress(AttributeError, OSError):  # Linux
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _run_inside(options: argparse.Namespace) -> int:
    server = _checked(options)
    try:
        server.start()
        print(f"ready, open {server.file.url}", flush=True)
        signal.signal(signal.SIGTERM, _interrupt)  # Ray has put its own there
        return _serve(server)
    finally:
        server.stop()


def _serve(server: "Server") -> int:
    """Until a signal, then until what was accepted is answered; a second signal ends that."""
    from serve.running import drain

    try:
        server.wait()
    except KeyboardInterrupt:
        return _told(drain(server.file.longest_s, _tell))


def _check(options: argparse.Namespace) -> int:
    server = _checked(options)
    names = ", ".join(app.name for app in server.file.applications)
    print(f"{options.config}: nothing is wrong with {names}")
    return DONE


def _drain(options: argparse.Namespace) -> int:
    from rayjobs import cluster
    from serve.running import QUIET, drain

    cluster.start({**QUIET, "address": "auto"})
    return _told(drain(options.seconds, _tell))


def _checked(options: argparse.Namespace) -> "Server":
    from serve.file import load

    file, values = load(options.config, options.overrides)
    from serve.running import Server

    server = Server(file, values)
    server.check()
    return server


def _tell(active: int) -> None:
    print(f"new requests are refused, {active} are finished; again to stop at once", flush=True)


def _told(left: int) -> int:
    if left:
        print(f"error: {left} requests took longer than they may", file=sys.stderr)
        return FAILED
    print("all requests are answered", flush=True)
    return DONE


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
