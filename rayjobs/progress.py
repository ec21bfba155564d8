"""Progress while a job runs: a counter that all workers report to, and what the driver shows of it.

Knows nothing of what is counted.
"""

import sys
import threading
import time
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayjobs.bar import LOG_EVERY_S, POLL_S, SHORTEST_S, Bar
from rayjobs.watchdog import Places, Stall, Watch

BEGAN, LAST = "began", "last"
"""The notes with the unix seconds at which work on the first began, and the last was done."""
MAX_REPORTS_PER_S = 100
"""Of all workers together, but for those of fewer: each of them reports once a second."""
FATAL = "fatal"
"""The note with an error that ends the work."""
DEVICE = "device"
"""The note with the workers' device, in words."""
DOING = "doing"
"""The note with what is done before anything can be counted."""


class Counter:
    """What is done so far. An actor, so that workers anywhere can report to it."""

    def __init__(self) -> None:
        self.done = 0
        self.notes: dict[str, Any] = {}
        self.places = Places()
        self.workers: set[str] = set()

    def join(self, worker: str) -> None:
        """A worker of this run is there, of that name in what it makes."""
        self.workers.add(worker)

    def has(self, worker: str) -> bool:
        return worker in self.workers

    def begin(self, **notes: Any) -> None:
        """Work on the first has begun: what was before is the start."""
        self.notes |= {BEGAN: time.time()} | notes | self.notes

    def add(self, done: int, failed: int = 0) -> None:
        self.done += done
        self.notes[LAST] = time.time()
        if failed:
            self.notes["failed"] = self.notes.get("failed", 0) + failed

    def set(self, done: int, **notes: Any) -> None:
        """For work that may go back to an earlier point."""
        if done > self.done:
            self.notes[LAST] = time.time()
        self.done = done
        self.notes |= notes

    def read(self) -> tuple[int, dict[str, Any]]:
        return self.done, self.notes

    def beat(self, who: str, at: str | None, progress: int) -> None:
        self.places.beat(who, at, progress)

    def stall(self) -> Stall:
        return self.places.stall()


class Reporter:
    """A worker's way to the counter: at most one call in `every_s`, however much it does."""

    def __init__(self, counter: Any, every_s: float):
        self._counter, self._every_s = counter, every_s
        self._done = self._failed = 0
        self._next = 0.0

    def add(self, done: int, failed: int = 0) -> None:
        self._done += done
        self._failed += failed
        if time.monotonic() >= self._next:
            self.flush()

    def flush(self) -> None:
        if self._done:
            self._counter.add.remote(self._done, self._failed)
        self._done = self._failed = 0
        self._next = time.monotonic() + self._every_s


def report_every_s(num_workers: int) -> float:
    """How often each of so many workers reports."""
    return max(1.0, num_workers / MAX_REPORTS_PER_S)


class Progress:
    """A context in which a bar follows `counter`; it shows the rate and an estimate of the rest."""

    def __init__(self, total: int, unit: str, initial: int = 0):
        self.total, self.unit, self.initial = total, unit, initial
        self.worked_s: float | None = None
        """How long the work took, without the start: known at the end, or told by its owner."""
        # Without CPUs of its own it can always be placed, and here no other node's end ends it.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor = ray.remote(Counter).options(num_cpus=0, scheduling_strategy=here)
        self.counter: Any = actor.remote()
        self._started = time.time()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> "Progress":
        left = self.total - self.initial
        print(f"{left:,} {self.unit} to make; starting workers", file=sys.stderr, flush=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        notes = self.read()[1]
        if self.worked_s is None and BEGAN in notes and LAST in notes:
            self.worked_s = max(notes[LAST] - notes[BEGAN], SHORTEST_S)
        self._stop.set()
        self._thread.join(timeout=5)

    def _follow(self) -> None:
        told = 0.0
        while not (read := self.read())[0] and not self._stop.wait(POLL_S):
            if DOING in read[1] and time.monotonic() > told + LOG_EVERY_S:
                print(read[1][DOING], file=sys.stderr, flush=True)
                told = time.monotonic()
        began = read[1].get(BEGAN, time.time())
        if read[0]:
            waited_s = max(0.0, began - self._started)
            print(f"workers began after {waited_s:.0f} s", file=sys.stderr, flush=True)
        with Bar(self.total, self.unit, began, self.initial) as bar:
            while not self._stop.wait(POLL_S):
                self._show(bar)
            bar.worked_s = self.worked_s
            self._show(bar)

    def _show(self, bar: Bar) -> None:
        done, notes = self.read()
        shown = {
            name: note
            for name, note in notes.items()
            if isinstance(note, (int, str)) and name not in (DOING, DEVICE)
        }
        if shown:
            bar.set_postfix(shown, refresh=False)
        new = min(done, self.total) - int(bar.n)
        if new > 0:
            bar.update(new)
        elif done and new < 0:
            bar.n = done

    def is_own(self, worker: str) -> bool:
        """Whether a worker of that name was of this run, dead ones included."""
        return bool(ray.get(self.counter.has.remote(worker)))

    def watch(self, limit_s: float | None) -> Watch:
        """A context that ends when workers make no progress for so long."""
        return Watch(lambda: ray.get(self.counter.stall.remote(), timeout=4 * POLL_S), limit_s)

    def read(self) -> tuple[int, dict[str, Any]]:
        """What is done, and the notes."""
        try:
            read: tuple[int, dict[str, Any]] = ray.get(
                self.counter.read.remote(), timeout=4 * POLL_S
            )
        except Exception:  # the bar is no reason for a job to fail
            return 0, {}
        return read
