"""Checkpoints on storage: written whole or not at all, verified before use, pruned.

A checkpoint is a folder of files and, written last beside it, a small note with their hashes. Owns
that layout. Knows nothing of what the files hold, and nothing of torch.
"""

import contextlib
import hashlib
import json
import logging
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayjobs import storage
from rayjobs.storage import NotThere, StorageError

NAME = "step-{:08d}"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was written completely."""

    step: int
    files: dict[str, dict[str, Any]]
    """By name: sha256 and bytes."""
    facts: dict[str, Any]


class Checkpoints:
    """The checkpoints below `uri`."""

    def __init__(self, uri: str):
        self.uri = uri

    def list(self) -> list[Checkpoint]:
        """The complete ones, oldest first."""
        checkpoints = []
        for name in storage.list_files(self.uri):
            if re.fullmatch(r"step-\d{8}\.json", name):
                try:
                    note = json.loads(storage.read_bytes(storage.join(self.uri, name)))
                except NotThere:
                    continue  # pruned since it was listed
                checkpoints.append(Checkpoint(note["step"], note["files"], note["facts"]))
        return sorted(checkpoints, key=lambda checkpoint: checkpoint.step)

    def put(self, step: int, name: str, path: Path) -> dict[str, Any]:
        """Store one file of a future checkpoint; return its entry for `commit`."""
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        storage.put_file(storage.join(self.uri, NAME.format(step), name), path)
        return {"sha256": sha256, "bytes": path.stat().st_size}

    def put_note(self, step: int, name: str, note: dict[str, Any]) -> None:
        """Store something small beside a checkpoint's files."""
        uri = storage.join(self.uri, NAME.format(step), name)
        storage.write_bytes(uri, json.dumps(note).encode())

    def note(self, step: int, name: str) -> dict[str, Any] | None:
        """What `put_note` stored, or None."""
        try:
            data = storage.read_bytes(storage.join(self.uri, NAME.format(step), name))
        except NotThere:
            return None
        note: dict[str, Any] = json.loads(data)
        return note

    def commit(self, step: int, files: dict[str, dict[str, Any]], facts: dict[str, Any]) -> None:
        """Make a checkpoint of files that are stored already."""
        note = {"step": step, "files": files, "facts": facts}
        uri = storage.join(self.uri, f"{NAME.format(step)}.json")
        storage.write_bytes(uri, json.dumps(note, indent=1).encode())

    def fetch(self, checkpoint: Checkpoint) -> Path | None:
        """A local folder with its files, which the caller removes; None when one is damaged."""
        folder = Path(tempfile.mkdtemp(prefix="checkpoint-"))
        for name, entry in checkpoint.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            uri = storage.join(self.uri, NAME.format(checkpoint.step), name)
            try:
                storage.get_file(uri, path)
                with path.open("rb") as file:
                    is_whole = hashlib.file_digest(file, "sha256").hexdigest() == entry["sha256"]
            except NotThere:
                is_whole = False
            if not is_whole:
                shutil.rmtree(folder)
                return None
        return folder

    def is_whole(self, checkpoint: Checkpoint) -> bool:
        """Whether all of its files are as they were written."""
        folder = self.fetch(checkpoint)
        if folder is not None:
            shutil.rmtree(folder)
        return folder is not None

    def latest(self) -> Checkpoint | None:
        """The latest one whose files are all as they were written."""
        for checkpoint in reversed(self.list()):
            if self.is_whole(checkpoint):
                return checkpoint
            logging.getLogger("rayjobs").warning("checkpoint %d is not whole", checkpoint.step)
        return None

    def prune(self, keep: set[int]) -> None:
        """Remove complete checkpoints of other steps than `keep`, and remains of incomplete ones.

        Files newer than every complete checkpoint may still be being written, and stay.
        """
        for checkpoint in self.list():
            if checkpoint.step not in keep:
                self._remove(checkpoint.step)
        whole = sorted(NAME.format(checkpoint.step) for checkpoint in self.list())
        folders = {n.split("/")[0] for n in storage.list_files(self.uri) if "/" in n}
        for name in sorted(folders - set(whole)):
            if re.fullmatch(r"step-\d{8}", name) and whole and name < whole[-1]:
                storage.remove_folder(storage.join(self.uri, name))

    def _remove(self, step: int) -> None:
        # The note first: a checkpoint that is removed only in part must not look complete.
        storage.remove(storage.join(self.uri, f"{NAME.format(step)}.json"))
        with contextlib.suppress(StorageError):  # the next pruning tries again
            storage.remove_folder(storage.join(self.uri, NAME.format(step)))
