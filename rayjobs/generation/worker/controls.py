"""A job's ControlNets beside its engine: what of them is in requests, in identities, in rows.

Owns the way from control pictures to what is stored of them. Knows nothing of where pictures lie.
"""

from typing import Any

from rayjobs import storage
from rayjobs.dataset.records import Row, conditioning
from rayjobs.diffusion.control.fitting import fitted
from rayjobs.diffusion.engine import Engine
from rayjobs.diffusion.request import Control
from rayjobs.generation.config import GenerateConfig
from rayjobs.generation.controls import ControlConfig
from rayjobs.generation.worker.pictures import Sources
from rayjobs.images.encode import encode_picture


class JobControls:
    """The job's ControlNets, fetched and loaded, in the order of its `controls`."""

    def __init__(self, config: GenerateConfig, engine: Engine):
        self._config = config.controls
        self._is_stored = config.output.control_images
        self._paths = [str(storage.fetch(each.uri)) for each in config.controls]
        self._ids = [engine.controls.load(path).sha256 for path in self._paths]
        self._vae_scale = engine.model.vae_scale

    def identity(self, sources: Sources) -> dict[str, Any]:
        """What of controls decides a record's pixels; nothing where it has none."""
        used = [
            [net, source.sha256, control.scale, control.start, control.end, *_way(control)]
            for net, source, control in zip(self._ids, sources.controls, self._config, strict=False)
            if source is not None
        ]
        return {"controls": used} if used else {}

    def of_request(self, sources: Sources) -> tuple[Control, ...]:
        return tuple(
            Control(
                path=path,
                image=source.pixels,
                scale=control.scale,
                start=control.start,
                end=control.end,
                preprocess=control.preprocess,
            )
            for path, source, control in zip(
                self._paths, sources.controls, self._config, strict=False
            )
            if source is not None
        )

    def columns(self, sources: Sources, size: tuple[int, int]) -> Row:
        """The pictures as the ControlNets were given them, where the job stores them: as large as
        the image, without loss."""
        if not self._is_stored:
            return {}
        found: Row = {}
        names = conditioning(len(self._config))
        for name, source, control in zip(names, sources.controls, self._config, strict=False):
            if source is not None and source.image is not None:
                picture = fitted(source.image, size, self._vae_scale, control.preprocess)
                found[name] = {"bytes": encode_picture(picture, "png", 100), "path": None}
        return found


def _way(control: ControlConfig) -> list[str]:
    return [] if control.preprocess is None else [control.preprocess]
