"""A job's IP-Adapters on one engine: what each record has of them.

Owns the way from a record's pictures to a request's, and what of them decides its pixels.
"""

from collections.abc import Iterator
from typing import Any

from rayjobs import storage
from rayjobs.diffusion.engine import Engine
from rayjobs.diffusion.request import IpAdapter
from rayjobs.generation.config import GenerateConfig
from rayjobs.generation.ip_adapters import IpAdapterConfig
from rayjobs.generation.worker.pictures import Source, Sources


class JobIpAdapters:
    """Those of a configuration, loaded."""

    def __init__(self, config: GenerateConfig, engine: Engine):
        self._configs = config.ip_adapters
        self._paths = [
            (str(storage.fetch(each.uri)), str(storage.fetch(each.encoder)))
            for each in self._configs
        ]
        self._hashes = [engine.ip_adapters.load(*pair).sha256 for pair in self._paths]

    def identity(self, sources: Sources) -> dict[str, Any]:
        """What of them decides a record's pixels; nothing where it has no picture."""
        used = [
            [self._hashes[number], source.sha256, config.scale]
            for number, config, source in self._used(sources)
            if config.scale
        ]
        return {"ip_adapters": used} if used else {}

    def of_request(self, sources: Sources) -> tuple[IpAdapter, ...]:
        """A record's, for its request."""
        return tuple(
            IpAdapter(
                path=self._paths[number][0],
                encoder=self._paths[number][1],
                image=source.pixels,
                scale=config.scale,
            )
            for number, config, source in self._used(sources)
        )

    def _used(self, sources: Sources) -> Iterator[tuple[int, IpAdapterConfig, Source]]:
        each = zip(self._configs, sources.references, strict=False)
        for number, (config, source) in enumerate(each):
            if source is not None:
                yield number, config, source
