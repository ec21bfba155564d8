"""The command line.

Owns how a command ends: its exit code, and one line for what went wrong.
"""

import gc
import os
import signal
import sys
import threading

from rayjobs.cli.arguments import KINDS, parse
from rayjobs.cli.commands import BAD_INPUT, FAILED, INTERRUPTED

__all__ = ["KINDS", "main"]


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return its exit code.

    0 done, 2 bad input or storage that this process cannot use, 3 finished with failed records, 130
    interrupted (resumable), 1 anything else.
    """
    options = parse(arguments)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup leaves it
            signal.signal(signal.SIGHUP, _interrupt)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    gc.set_threshold(50_000)  # importing torch makes a million objects, and no garbage
    from rayjobs.config import BadInput, JobFailed
    from rayjobs.storage import StorageError

    try:
        return int(options.command(options))
    except (BadInput, StorageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except JobFailed as error:
        print(f"error: {error}", file=sys.stderr)
        print("what is finished is kept; the same command continues", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("interrupted; the same command continues where this stopped", file=sys.stderr)
        return INTERRUPTED


def _interrupt(number: int, _: object) -> None:
    """What ends a job from outside is an interruption, like Ctrl-C.

    Once: `timeout` and others send it to the process and then to its group, while this ends.
    """
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt
