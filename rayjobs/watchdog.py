"""Tells where a job hangs in which no worker makes progress, and ends one that hangs for good.

Owns what progress is (a number that a worker raises), how long there may be none, and what is told.
Knows nothing of shards and steps, nor of Ray: `Places` is part of an actor, `Beat` sends to it.
"""

import signal
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from rayjobs.config import JobFailed

BEAT_S = 10.0
"""How often a worker says where it is."""
TELL_S = 300.0
"""After so long without progress it is told where workers are, and again as often."""
PATIENCE = 5.0
"""Or after so many times the longest pause that the job has had: some steps take minutes."""
LONGEST_TELL_S = 1800.0
GONE_S = 120.0
"""A worker that was not heard of for so long, while others go on, has been replaced."""
MAX_NAMED = 3
ENOUGH = signal.SIGUSR1
"""Interrupts the main thread. Not SIGINT, which a process in a script's background ignores."""


@dataclass
class Place:
    """Where a worker is."""

    who: str
    at: str
    progress: int
    changed_s: float
    heard_s: float


@dataclass(frozen=True)
class Stall:
    """How long no worker has made progress, the longest pause before, and where workers are."""

    seconds: float
    longest_s: float
    places: tuple[str, ...]

    def told(self) -> str:
        named = self.places[:MAX_NAMED]
        more = f", and {len(self.places) - len(named)} more" if self.places[MAX_NAMED:] else ""
        where = "; ".join(named) + more or "no worker is at work"
        return f"no progress for {_minutes(self.seconds)}: {where}"


class Places:
    """Where all workers are, and when they last made progress."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._places: dict[str, Place] = {}
        self._changed_s: float | None = None
        """None before the first worker: a job may wait for others' as long as they take."""
        self._longest_s = 0.0

    def beat(self, who: str, at: str | None, progress: int) -> None:
        """A worker is there, or is done with what it had (None)."""
        now_s = self._clock()
        place = self._places.get(who)
        if at is None:
            if self._places.pop(who, None) is not None:
                self._go_on(now_s)
        elif place is None or place.progress != progress:
            self._places[who] = Place(who, at, progress, now_s, now_s)
            self._go_on(now_s)
        else:
            place.at, place.heard_s = at, now_s

    def stall(self) -> Stall:
        now_s = self._clock()
        # Who stands longest comes first: the others may wait for it.
        places = sorted(self._places.values(), key=lambda each: each.changed_s)
        told = tuple(_told(each, now_s) for each in places)
        changed_s = now_s if self._changed_s is None else self._changed_s
        return Stall(now_s - changed_s, self._longest_s, told)

    def _go_on(self, now_s: float) -> None:
        if self._changed_s is not None:
            self._longest_s = max(self._longest_s, now_s - self._changed_s)
        self._changed_s = now_s
        for who in [w for w, each in self._places.items() if each.heard_s < now_s - GONE_S]:
            del self._places[who]


def _told(place: Place, now_s: float) -> str:
    silent_s = now_s - place.heard_s
    silence = f", not heard of for {_minutes(silent_s)}" if silent_s > 3 * BEAT_S else ""
    return f"{place.who} at {place.at}{silence}"


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


class Beat:
    """Says where this worker is, from a thread: the worker itself may hang.

    `send(who, at, progress)` reaches `Places`.
    """

    def __init__(self, who: str, send: Callable[[str, str | None, int], Any]):
        self._who, self._send = who, send
        self._at: Callable[[], str] | None = None
        self._progress: Callable[[], int] = lambda: 0
        self._ticks = 0
        self._thread_id = 0
        self._wake = threading.Event()
        threading.Thread(target=self._run, name="watchdog", daemon=True).start()

    @contextmanager
    def working(
        self, at: Callable[[], str], progress: Callable[[], int] = lambda: 0
    ) -> Generator[None]:
        """This thread works at what `at` says, which `progress` grows by; beyond that it rests."""
        self._thread_id, self._progress, self._at = threading.get_ident(), progress, at
        self._wake.set()
        try:
            yield
        finally:
            self._at = None
            self._wake.set()

    def tick(self, at: str) -> None:
        """Progress of work that counts nothing itself, and where it is now."""
        self._ticks += 1
        self._at = lambda: at

    def _run(self) -> None:
        while True:
            self._wake.clear()
            at = self._at
            place = None if at is None else self._where(at)
            self._send(self._who, place, self._ticks + self._progress())
            self._wake.wait(BEAT_S)

    def _where(self, at: Callable[[], str]) -> str:
        try:
            place = at()
        except RuntimeError:  # a dictionary has changed meanwhile
            place = "work"
        return f"{place} ({_line(self._thread_id)})"


def _line(thread_id: int) -> str:
    """The line that a thread is at: of this package, unless none is."""
    frame = innermost = sys._current_frames().get(thread_id)
    while frame is not None and "rayjobs" not in Path(frame.f_code.co_filename).parts:
        frame = frame.f_back
    frame = frame or innermost
    if frame is None:
        return "it has ended"
    path = "/".join(Path(frame.f_code.co_filename).parts[-3:])
    return f"{path}:{frame.f_lineno} in {frame.f_code.co_name}"


class Watch:
    """A context that tells of a stall, and ends the main thread's work after `limit_s` of one.

    Raises JobFailed then. Without a limit it only tells.
    """

    def __init__(self, read: Callable[[], Stall], limit_s: float | None):
        self._read, self._limit_s = read, limit_s
        self._stop = threading.Event()
        self._reason: str | None = None
        self._before: Any = None
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watch":
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(ENOUGH, signal.default_int_handler)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._before is not None:  # one on its way must not end the process
            signal.signal(ENOUGH, self._before or signal.SIG_IGN)
        if self._reason is not None and isinstance(error, KeyboardInterrupt):
            raise JobFailed(self._reason) from None

    def _watch(self) -> None:
        told_s = 0.0
        while not self._stop.wait(min(BEAT_S, self._limit_s or BEAT_S)):
            try:
                stall = self._read()
            except Exception:  # it is no reason for a job to fail
                continue
            if self._limit_s is not None and stall.seconds > self._limit_s:
                self._end(stall)
                return
            tell_s = min(max(TELL_S, PATIENCE * stall.longest_s), LONGEST_TELL_S)
            if stall.seconds < told_s:
                told_s = 0.0
            if stall.seconds > max(tell_s, told_s + TELL_S):
                told_s = stall.seconds
                print(f"warning: {stall.told()}", file=sys.stderr, flush=True)

    def _end(self, stall: Stall) -> None:
        """Interrupt the main thread, which waits for workers and looks at nothing else."""
        limit = _minutes(self._limit_s or 0.0)
        self._reason = (
            f"{stall.told()}; workers.max_stall_s is {limit}; what is finished is kept, and the "
            "same command continues"
        )
        main = threading.main_thread().ident
        if main is not None and not self._stop.is_set():
            signal.pthread_kill(main, ENOUGH if self._before is not None else signal.SIGINT)
