"""Whether a record is of its data set's own job, told by its prompt, its model and its watermark.

Owns the comparison with the snapshots. Other pixels are not looked at: to make a record again shows
them.
"""

import threading
from collections.abc import Iterator
from typing import Any

from rayjobs.dataset.lock import Lock
from rayjobs.generation.spec.lock import config_of, open_spec, record_of
from rayjobs.generation.spec.records import Spec
from rayjobs.provenance import marks


class Origin:
    """What the lock and the snapshots of a data set say of its records. For several threads."""

    def __init__(self, uri: str, lock: Lock):
        self.uri = uri
        self.lock = lock
        self._specs: dict[int, Spec] = {}
        self._turn = threading.Lock()

    def doubt(self, row: dict[str, Any]) -> str | None:
        """Why a row is of another job, if it is. Its seed may be a later one than the job's."""
        numbered = enumerate(self.lock.segments)
        its = next((pair for pair in numbered if row["record"] in pair[1].records), None)
        if its is None:
            return None
        number, segment = its
        if row["model_sha256"] != segment.model_sha256:
            return f"is by another model than the job's ({str(row['model_sha256'])[:12]})"
        with self._turn:
            if number not in self._specs:
                config = config_of(segment, self.uri)
                self._specs[number] = open_spec(config, segment, number)
            prompt = record_of(self._specs[number], segment, row["record"]).prompt
        if row["prompt"] != prompt:
            return f"has the prompt {row['prompt']!r}, where the job has {prompt!r}"
        return None

    @property
    def is_marked(self) -> bool:
        """Whether any record has to have a watermark."""
        return any(marks.is_marked(segment.job) for segment in self.lock.segments)

    def look(self, row: dict[str, Any]) -> Iterator[str]:
        """What is wrong with a row's watermark, where its job asks for one."""
        its = (segment for segment in self.lock.segments if row["record"] in segment.records)
        if any(marks.is_marked(segment.job) for segment in its):
            yield from marks.faults(row, marked=True, signed=False)
