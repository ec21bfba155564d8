"""Entries as workers commit them, gathered into a file for each thousand shards once all are there.

Owns what is kept of groups that are not complete. Storage is asked for nothing that the driver was
told: of a shard that is made in this run no entry is read, and no manifest is listed.
"""

import json

import numpy as np

from rayjobs.dataset.manifest import ENTRY, GROUP, Entry, Manifest
from rayjobs.dataset.records import canonical_json


class Gathering:
    """`done` says of each shard whether it was finished before, (num_shards,) bool."""

    def __init__(self, manifest: Manifest, done: np.ndarray):
        self._manifest, self._done = manifest, done
        self._open: dict[int, dict[int, bytes]] = {}
        """By group and shard; as bytes, which take a third of the entries' memory."""

    def add(self, entry: Entry) -> None:
        """Take in the entry of a committed shard; may gather its group."""
        shard, group = entry["shard"], entry["shard"] // GROUP
        facts = {name: entry[name] for name in ENTRY.names if name in entry}
        self._open.setdefault(group, {})[shard] = canonical_json(facts)
        self._done[shard] = True
        if self._done[group * GROUP : (group + 1) * GROUP].sum() == GROUP:
            known = {shard: json.loads(facts) for shard, facts in self._open.pop(group).items()}
            self._manifest.gather(group, known)
