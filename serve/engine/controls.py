"""The ControlNets beside one model: read while others are drawn, held by bytes, evicted when idle.

Owns which stay in memory. Knows nothing of requests, of names or of HTTP.
"""

from dataclasses import dataclass, field
from pathlib import Path

from rayjobs import storage
from rayjobs.diffusion.control.bank import ControlNet
from rayjobs.diffusion.control.files import locate
from rayjobs.diffusion.engine import Engine


class ControlMemoryFull(RuntimeError):
    """Those of requests in progress leave no room for one more."""


@dataclass
class ControlCache:
    """At most `max_bytes` of ControlNets; of those that no row uses the least recently used go."""

    engine: Engine
    max_bytes: float
    paths: dict[str, str] = field(default_factory=dict)
    """Of those that were read, by their uris."""

    @property
    def num_bytes(self) -> int:
        return self.engine.controls.num_bytes

    def uris(self) -> set[str]:
        """Of those in memory."""
        bank = self.engine.controls
        return {uri for uri, path in list(self.paths.items()) if bank.find(path) is not None}

    def find(self, uri: str) -> ControlNet | None:
        """One that is in memory; storage is not asked."""
        path = self.paths.get(uri)
        return None if path is None else self.engine.controls.find(path)

    def fetch(self, uri: str) -> tuple[str, int]:
        """A local path with a ControlNet, and its size. Raises ValueError for what is none, and
        for one that there is never room for. In any thread."""
        path = str(Path(storage.to_local(uri)))
        size = locate(path).weights.stat().st_size
        if size > self.max_bytes:
            raise ValueError(
                f"it takes {size / 2**30:.3g} GiB, more than engine.control_memory_gb, "
                f"{self.max_bytes / 2**30:.3g}; raise that"
            )
        return path, size

    def read(self, uri: str, path: str) -> ControlNet:
        """One from its files, in any thread; `admit` keeps it."""
        net = self.engine.controls.read(path)
        self.paths = {**self.paths, uri: path}
        return net

    def admit(self, nets: tuple[ControlNet, ...]) -> None:
        """Keep the ControlNets of a request, between two steps. Raises ControlMemoryFull."""
        bank = self.engine.controls
        for net in nets:
            bank.hold(net)
        rows = self.engine.rows.values()
        used = {control.net.sha256 for row in rows for control in row.controls}
        wanted = {net.sha256 for net in nets}
        for sha256 in [each for each in bank.held() if each not in used | wanted]:
            if bank.num_bytes > self.max_bytes:
                bank.forget(sha256)
        if nets and bank.num_bytes > self.max_bytes:
            for sha256 in wanted - used:
                bank.forget(sha256)
            raise ControlMemoryFull(
                "the ControlNets of requests in progress fill engine.control_memory_gb; "
                "try again later"
            )
