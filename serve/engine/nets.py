"""The ControlNets and IP-Adapters beside one model: read while others are drawn, held by bytes,
evicted when idle.

Owns which stay in memory. Knows nothing of requests, of names or of HTTP.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rayjobs import storage
from rayjobs.diffusion.control import files as control_files
from rayjobs.diffusion.engine import Engine
from rayjobs.diffusion.ip_adapter import files as ip_adapter_files

Uris = tuple[str, ...]
"""A ControlNet's; or an IP-Adapter's and its encoder's."""


@dataclass(frozen=True)
class Kind:
    """What differs between ControlNets and IP-Adapters."""

    name: str
    one: str
    """The same in a sentence."""
    entry: Literal["control", "ip_adapter"]
    """Its kind in the registry."""
    limit: str
    """The key that says how many bytes there may be."""
    bank: Callable[[Engine], Any]
    of_row: Callable[[Any], Any]
    """What a row has of them."""
    num_bytes: Callable[..., int]
    """Of the one at local paths. Raises ValueError for what is none."""


CONTROLS = Kind(
    "ControlNet",
    "a ControlNet",
    "control",
    "engine.control_memory_gb",
    lambda engine: engine.controls,
    lambda row: row.controls,
    lambda path: control_files.locate(path).weights.stat().st_size,
)
IP_ADAPTERS = Kind(
    "IP-Adapter",
    "an IP-Adapter",
    "ip_adapter",
    "engine.ip_adapter_memory_gb",
    lambda engine: engine.ip_adapters,
    lambda row: row.ip_adapters,
    lambda path, encoder: ip_adapter_files.locate(path, encoder).num_bytes,
)


class NetMemoryFull(RuntimeError):
    """Those of requests in progress leave no room for one more."""


@dataclass
class NetCache:
    """At most `max_bytes` of a kind; of those that no row uses the least recently used go."""

    engine: Engine
    kind: Kind
    max_bytes: float
    paths: dict[Uris, tuple[str, ...]] = field(default_factory=dict)
    """Of those that were read, by their uris."""

    @property
    def bank(self) -> Any:
        return self.kind.bank(self.engine)

    def uris(self) -> set[Uris]:
        """Of those in memory."""
        known = list(self.paths.items())
        return {uris for uris, paths in known if self.bank.find(*paths) is not None}

    def find(self, uris: Uris) -> Any | None:
        """One that is in memory; storage is not asked."""
        paths = self.paths.get(uris)
        return None if paths is None else self.bank.find(*paths)

    def fetch(self, uris: Uris) -> tuple[tuple[str, ...], int]:
        """Local paths with one, and its size. Raises ValueError for what is none, and for one that
        there is never room for. In any thread."""
        paths = tuple(str(Path(storage.to_local(uri))) for uri in uris)
        size = self.kind.num_bytes(*paths)
        if size > self.max_bytes:
            raise ValueError(
                f"it takes {size / 2**30:.3g} GiB, more than {self.kind.limit}, "
                f"{self.max_bytes / 2**30:.3g}; raise that"
            )
        return paths, size

    def read(self, uris: Uris, paths: tuple[str, ...]) -> Any:
        """One from its files, in any thread; `admit` keeps it."""
        net = self.bank.read(*paths)
        self.paths = {**self.paths, uris: paths}
        return net

    def admit(self, nets: tuple[Any, ...]) -> None:
        """Keep those of a request, between two steps. Raises NetMemoryFull."""
        bank = self.bank
        for net in nets:
            bank.hold(net)
        rows = self.engine.rows.values()
        used = {each.net.sha256 for row in rows for each in self.kind.of_row(row)}
        wanted = {net.sha256 for net in nets}
        for sha256 in [each for each in bank.held() if each not in used | wanted]:
            if bank.num_bytes > self.max_bytes:
                bank.forget(sha256)
        if nets and bank.num_bytes > self.max_bytes:
            for sha256 in wanted - used:
                bank.forget(sha256)
            raise NetMemoryFull(
                f"the {self.kind.name}s of requests in progress fill {self.kind.limit}; "
                "try again later"
            )
