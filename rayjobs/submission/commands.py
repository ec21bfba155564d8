"""The arguments of `rayjobs submit`, `stop` and `leave`. Imports what they run only to run it."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any


def add(commands: Any, kinds: Sequence[str], of_generate: Callable[[Any], None]) -> None:
    """Add them; `of_generate` adds the options that generate has alone."""
    submit = commands.add_parser("submit", help="have a Ray cluster run a job, and follow it")
    submit.add_argument("kind", metavar="KIND", choices=kinds, help=", ".join(kinds))
    submit.add_argument("config", metavar="CONFIG", help="a YAML file")
    submit.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as in workers.min=8")
    submit.add_argument(
        "--wait", choices=("yes", "no"), default="yes", help="follow it to its end (default: yes)"
    )
    submit.add_argument("--python", default="python", help="of the cluster's nodes")
    of_generate(submit)
    submit.set_defaults(command=_submit)
    stop = commands.add_parser("stop", help="end a submitted job; submitting it again continues")
    stop.add_argument("id", metavar="ID", help="as submit told it")
    stop.set_defaults(command=_stop)
    for command in (submit, stop):
        command.add_argument(
            "--address", help="the dashboard, http://HEAD:8265; without it RAY_ADDRESS"
        )
    leave = commands.add_parser("leave", help="tell Ray that this machine will be taken away")
    leave.add_argument("--seconds", type=float, default=90.0, help="that it has (default: 90)")
    leave.set_defaults(command=_leave)


def _submit(options: argparse.Namespace) -> int:
    from rayjobs.config import BadInput
    from rayjobs.submission import submit

    flags = [f"--limit={options.limit}"] if options.limit is not None else []
    flags += ["--extend"] * options.extend + ["--retry-failed"] * options.retry_failed
    if flags and options.kind != "generate":
        raise BadInput(f"{flags[0]} is for generate, not for {options.kind}")
    wanted = submit.Wanted(options.kind, options.config, options.overrides, flags)
    return submit.submit(wanted, options.address, options.python, wait=options.wait == "yes")


def _stop(options: argparse.Namespace) -> int:
    from rayjobs.submission import submit

    return submit.stop(options.id, options.address)


def _leave(options: argparse.Namespace) -> int:
    from rayjobs.submission import leave

    return leave.leave(options.seconds)
