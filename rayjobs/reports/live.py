"""A data set's page while its job goes: from its first finished shards on.

Owns what a running job's page is made of: the history, which is kept in memory so that the manifest
is read once, and a small sample of the pictures, however large the data set.
"""

import queue
import time

import numpy as np

from rayjobs.dataset.manifest import Entry, Manifest
from rayjobs.reports import dataset_report
from rayjobs.reports.history import History
from rayjobs.reports.rewriter import Rewriter
from rayjobs.reports.running import Running

MAX_PICTURES = 2_000


class LivePage(Rewriter):
    """A context in which a data set's page follows a run that is to make `to_make` images.

    After success writing it is left to whoever looks for duplicates too.
    """

    def __init__(self, output_uri: str, num_shards: int, to_make: int):
        super().__init__(self._write_page, dataset_report.BROKEN)
        self._output_uri, self._to_make = output_uri, to_make
        self._run = History()
        self._whole = History()
        self._seen = np.zeros(num_shards, bool)
        """The shards in the whole history."""
        self._added: queue.SimpleQueue[Entry] = queue.SimpleQueue()

    def add(self, entry: Entry) -> None:
        """A shard that is finished, by this run where the entry says `made`."""
        self._added.put(entry)

    def _write_page(self, again_by: float | None) -> None:
        self._take()
        if len(self._run):
            running = self._running(again_by)
            dataset_report.write(self._output_uri, MAX_PICTURES, self._whole, running)

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

    def _running(self, again_by: float | None) -> Running:
        made = self._run.total("rows")
        to_make = max(self._to_make, made)
        return Running(time.time(), again_by, made, to_make, self._run.rate, "images")
