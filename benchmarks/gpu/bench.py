"""What all items share: the model, the device, the sizes, and the ways to call once prepared."""

import gc
from functools import cached_property
from typing import Any

import torch

from benchmarks.gpu import paths, timing
from benchmarks.gpu.model import build
from rayjobs.diffusion.model import Model


class Bench:
    """One run. `small` is a thin model and few repeats, for a CPU: it tells no speed."""

    def __init__(self, device: str, small: bool, ways: list[str]):
        self.device = device
        self.small = small
        self.on_gpu = device.startswith("cuda")
        self.side = 8 if small else 128
        self.sizes = [1, 2, 4] if small else [1, 2, 4, 8, 16]
        self.repeats = 2 if small else 6
        self.ways = ways
        self._prepared: dict[str, paths.Path] = {}
        self.prepared_s: dict[str, float] = {}

    @cached_property
    def model(self) -> Model:
        return build(self.device, self.small)

    def way(self, name: str) -> paths.Path:
        """A way to call the UNet, prepared once for the whole run."""
        if name not in self._prepared:
            self._prepared[name] = self._prepare(name)
        return self._prepared[name]

    def _prepare(self, name: str) -> paths.Path:
        if name in ("blocks", "full"):
            return paths.compiled(self.model, name)
        made: dict[str, Any] = {
            "eager": paths.eager,
            "replay": paths.replay,
            "whole": paths.Whole,
        }
        path: paths.Path = made[name](self.model.unet)
        return path

    def drop_ways(self, keep: tuple[str, ...] = ()) -> None:
        """Free what ways hold that are not needed any more."""
        self._prepared = {name: path for name, path in self._prepared.items() if name in keep}
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def synchronize(self) -> None:
        timing.synchronize(self.device)
