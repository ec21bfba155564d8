"""A data set's page while its job goes: from its first finished shards on.

Owns what a running job's page is made of: the history, which is kept in memory so that each entry
of the manifest is read once, and a small sample of the pictures, however large the data set. It
looks at the manifest itself: workers' answers come hours later, for many shards at once.
"""

import time

import numpy as np

from rayjobs.dataset.manifest import Manifest
from rayjobs.reports import dataset_report
from rayjobs.reports.history import Activity, History
from rayjobs.reports.rewriter import Rewriter
from rayjobs.reports.running import Running

MAX_PICTURES = 2_000


class LivePage(Rewriter):
    """A context in which a data set's page follows a run that is to make `to_make` images.

    `done` says of each shard whether it was finished before. After success writing the page is left
    to whoever looks for duplicates too.
    """

    def __init__(self, manifest: Manifest, done: np.ndarray, to_make: int):
        super().__init__(self._write_page, dataset_report.BROKEN)
        self._manifest, self._to_make = manifest, to_make
        self._before = done
        self._seen = np.zeros(len(done), bool)
        """The shards in the whole history."""
        self._whole = History()
        self._run = Activity()

    def _write_page(self, again_by: float | None) -> bool:
        if not self._run.rows:
            self._look(self._seen | self._before)
        if self._run.rows:
            self._look(self._seen)
            running = self._running(again_by)
            dataset_report.write(self._manifest.uri, MAX_PICTURES, self._whole, running)
        return self._run.rows > 0

    def _look(self, known: np.ndarray) -> None:
        """Take in what is finished and not `known`: that of earlier runs comes second."""
        for entry in self._manifest.unseen(known):
            shard = entry["shard"]
            if self._seen[shard]:
                continue
            self._seen[shard] = True
            self._whole.add(entry)
            if not self._before[shard]:
                self._run.add(entry)

    def _running(self, again_by: float | None) -> Running:
        made = self._run.rows
        to_make = max(self._to_make, made)
        return Running(time.time(), again_by, made, to_make, self._run.rate, "images")
