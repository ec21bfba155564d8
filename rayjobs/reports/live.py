"""A job's page while the job goes: from its first finished shards on, at a bounded cost.

Owns when it is written. It keeps the history in memory, shows a small sample, and spends a fixed
small share of the time, however large the data set and however slow its storage.
"""

import contextlib
import queue
import threading
import time

import numpy as np

from rayjobs import storage
from rayjobs.config import BadInput
from rayjobs.dataset.manifest import Entry, Manifest
from rayjobs.reports import dataset_report
from rayjobs.reports.history import History
from rayjobs.reports.page import Running

POLL_S = 0.5
FIRST_S, SHORTEST_S, LONGEST_S = 5.0, 10.0, 300.0
"""Before the first page, and between two: as long as the job has run so far, within these."""
MAX_SHARE = 0.02
"""Of the time that may be spent on pages."""
MAX_PICTURES = 2_000


class LivePage:
    """A context in which a data set's page follows a run that is to make `to_make` images.

    After an interruption or a failure the page tells of it; after success writing it is left to
    whoever looks for duplicates too.
    """

    def __init__(self, output_uri: str, num_shards: int, to_make: int):
        self._output_uri, self._to_make = output_uri, to_make
        self._run = History()
        self._whole = History()
        self._seen = np.zeros(num_shards, bool)
        """The shards in the whole history."""
        self._added: queue.SimpleQueue[Entry] = queue.SimpleQueue()
        self._began = time.monotonic()
        self._next = self._began + FIRST_S
        self._cost_s = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> "LivePage":
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._stop.set()
        self._thread.join()
        # Who is told of bad input may have no business in this folder.
        if error is not None and not isinstance(error, BadInput):
            self._write(None)

    def add(self, entry: Entry) -> None:
        """A shard that is finished, by this run where the entry says `made`."""
        self._added.put(entry)

    def _follow(self) -> None:
        while not self._stop.wait(POLL_S):
            if time.monotonic() >= self._next:
                self._write(self._wait_s())

    def _wait_s(self) -> float:
        so_far_s = time.monotonic() - self._began
        return max(min(max(so_far_s, SHORTEST_S), LONGEST_S), self._cost_s / MAX_SHARE)

    def _write(self, wait_s: float | None) -> None:
        started = time.monotonic()
        with contextlib.suppress(storage.StorageError, *dataset_report.BROKEN):
            self._take()
            if len(self._run):
                running = self._running(wait_s)
                dataset_report.write(self._output_uri, MAX_PICTURES, self._whole, running)
        ended = time.monotonic()
        self._cost_s = ended - started
        self._next = max(started + (wait_s or 0.0), ended + self._cost_s / MAX_SHARE)

    def _take(self) -> None:
        """Read what was added; with the first of it, the manifest of earlier runs."""
        is_first = not len(self._run)
        while not self._added.empty():
            entry = self._added.get()
            if entry["made"]:
                self._run.add(entry)
            self._note(entry)
        if is_first and len(self._run):
            for entry in Manifest(self._output_uri).entries():
                self._note(entry)

    def _note(self, entry: Entry) -> None:
        if not self._seen[entry["shard"]]:
            self._seen[entry["shard"]] = True
            self._whole.add(entry)

    def _running(self, wait_s: float | None) -> Running:
        now = time.time()
        again_by = None if wait_s is None else now + wait_s + 2 * self._cost_s + 2 * POLL_S
        made = self._run.total("rows")
        return Running(now, again_by, made, max(self._to_make, made), self._run.rate)
