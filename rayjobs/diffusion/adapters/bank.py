"""The adapters beside one model, that differ from row to row of one call.

Owns which adapters are loaded and the hooks that apply them to the layers. Knows nothing of
requests. Legend: P slots, K adapters of a row.
"""

import contextlib
from collections.abc import Generator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from rayjobs.diffusion.adapters.layer import AdaptedLayer, Group, Uses
from rayjobs.diffusion.adapters.names import Layer, Layers
from rayjobs.diffusion.adapters.reader import Adapter, read
from rayjobs.diffusion.facts import Usual, distilled_sampler
from rayjobs.diffusion.files.beside import lora_file
from rayjobs.diffusion.model import Model
from rayjobs.diffusion.modules.pipeline import scheduler_config

LoraUse = tuple[tuple[str, float], ...]
"""A row's adapters: (SHA-256 of the file, scale), in order."""

Stamp = tuple[int, int, int]
"""A file's identity, size and time of change."""


class LoraBank:
    """The adapters loaded beside one model; each is held once, however many rows use it."""

    def __init__(self, model: Model):
        self.model = model
        self._known: dict[str, tuple[Stamp | None, str]] = {}
        self._adapters: dict[str, Adapter] = {}
        self._numbers: dict[str, int] = {"": 0}  # adapter 0 is all zeros: a row without one
        self._free: list[int] = []
        self._grouped: set[int] = set()
        """Adapters with changes that are no plain low-rank factors."""
        self._layers: dict[Layer, AdaptedLayer] = {}
        self._uses: Uses | None = None
        self._last_uses: tuple[list[LoraUse], Uses] | None = None
        self._handles: list[Any] = []

    @cached_property
    def layers(self) -> Layers:
        """The layers that an adapter can be for."""
        return Layers(self.model.family, self._parts)

    def load(self, path: str) -> str:
        """Make the adapter at `path` (a safetensors file or its folder) usable; return its SHA-256.

        A file that was replaced since is read again. Raises ValueError when the file is missing,
        is no adapter or one that cannot be used, or does not fit the model.
        """
        known = self._known.get(path)
        if known is not None and _stamp(path) in (None, known[0]):
            return known[1]
        return self.admit(self.read(path))

    def read(self, path: str) -> Adapter:
        """The adapter at `path`, not usable yet: touches no layer, so that any thread may do it.

        Raises ValueError as `load` does.
        """
        return read(path, lora_file(Path(path)), self.layers)

    def admit(self, adapter: Adapter) -> str:
        """Make an adapter that was read for this model usable, between two steps; its SHA-256."""
        if adapter.sha256 not in self._numbers:
            number = self._free.pop() if self._free else max(self._numbers.values()) + 1
            try:
                for layer, change in adapter.changes.items():
                    self._adapted(layer).put(number, change)
            except BaseException:
                self._release(number)
                raise
            self._numbers[adapter.sha256] = number
            if any(change.low_rank is None for change in adapter.changes.values()):
                self._grouped.add(number)
            self._adapters[adapter.sha256] = adapter.without_tensors()
        self._known[adapter.path] = (_stamp(adapter.path), adapter.sha256)
        return adapter.sha256

    def warnings(self, use: LoraUse) -> tuple[str, ...]:
        """What was not done as a row's adapters and scales may have meant it."""
        said: list[str] = []
        for sha256, scale in use:
            adapter = self._adapters[sha256]
            said += adapter.warnings
            told, own = adapter.prediction, self.model.prediction.kind
            if told not in (None, own):
                said.append(f"LoRA {adapter.file.name} was trained for {told}, the model is {own}")
            if adapter.is_dora and scale not in (0, 1):
                said.append(
                    f"LoRA {adapter.file.name} is a DoRA, whose effect is not linear in its scale: "
                    f"at {scale:g} the weight's direction is that of W + {scale:g} BA, as in peft"
                )
        return tuple(said)

    def usual(self, use: LoraUse) -> Usual:
        """What to ask for with a row's adapters: that of a distilled one, else the model's."""
        return self._distilled(use) or self.model.usual

    def sampler_changes(self, use: LoraUse) -> dict[str, Any]:
        """What a row's adapters change of the configuration of the model's own sampler."""
        usual = self._distilled(use)
        own = scheduler_config(self.model.scheduler)
        return {} if usual is None else distilled_sampler(usual, own)

    def sampler_config(self, use: LoraUse) -> dict[str, Any]:
        """The configuration of the model's own sampler, as a row's adapters change it."""
        config, changes = scheduler_config(self.model.scheduler), self.sampler_changes(use)
        defaults = [key for key in config.get("_use_default_values", []) if key not in changes]
        return config | changes | {"_use_default_values": defaults}

    @property
    def num_bytes(self) -> int:
        """Of all adapters, as they are stacked and padded."""
        return sum(layer.num_bytes for layer in list(self._layers.values()))

    def forget(self, sha256: str) -> None:
        """Free an adapter's index for the next one; no row may be using it."""
        self._release(self._numbers.pop(sha256))
        del self._adapters[sha256]
        self._known = {path: known for path, known in self._known.items() if known[1] != sha256}

    def detach(self) -> None:
        """Leave the model as it was, for whoever uses its parts on."""
        for handle in self._handles:
            handle.remove()

    @contextlib.contextmanager
    def applied(self, uses: Sequence[LoraUse]) -> Generator[None]:
        """Within this context, slot p of every call runs with the adapters of `uses[p]`."""
        if not any(uses):
            yield
            return
        self._uses = self._of_slots(uses)
        try:
            yield
        finally:
            self._uses = None

    @property
    def _parts(self) -> dict[str, Any]:
        encoders = zip(("text_encoder", "text_encoder_2"), self.model.text_encoders, strict=False)
        return {"unet": self.model.unet, **dict(encoders)}

    def _distilled(self, use: LoraUse) -> Usual | None:
        found = [self._adapters[sha256].usual for sha256, scale in use if scale]
        return next(filter(None, found), None)

    def _release(self, number: int) -> None:
        for layer in self._layers.values():
            layer.clear(number)
        self._free.append(number)
        self._grouped.discard(number)
        self._last_uses = None

    def _of_slots(self, slots: Sequence[LoraUse]) -> Uses:
        """The same as tensors; kept while it stays the same, since copying waits for a GPU."""
        if self._last_uses is None or self._last_uses[0] != list(slots):
            width = max(len(use) for use in slots)
            padded = [[*use, *[("", 0.0)] * (width - len(use))] for use in slots]
            device = self.model.device
            numbers = torch.tensor([[self._numbers[sha] for sha, _ in row] for row in padded])
            scales = torch.tensor([[s for _, s in row] for row in padded], dtype=torch.float32)
            groups = self._groups(slots)
            uses = Uses(numbers.to(device), scales.to(device), groups)
            self._last_uses = (list(slots), uses)
        return self._last_uses[1]

    def _groups(self, slots: Sequence[LoraUse]) -> tuple[Group, ...]:
        """Slots by adapter and scale, each at most once in a group; not of low-rank ones alone."""
        members: dict[tuple[int, float, int], list[int]] = {}
        for slot, use in enumerate(slots):
            for position, (sha256, scale) in enumerate(use):
                if not scale or self._numbers[sha256] not in self._grouped:
                    continue  # at 0 a DoRA too is as if it were not there
                nth = use[:position].count((sha256, scale))
                members.setdefault((self._numbers[sha256], scale, nth), []).append(slot)
        return tuple(
            Group(number, scale, self._slots(found, len(slots)))
            for (number, scale, _), found in members.items()
        )

    def _slots(self, members: list[int], num_slots: int) -> torch.Tensor | None:
        return None if len(members) == num_slots else torch.tensor(members).to(self.model.device)

    def _adapted(self, layer: Layer) -> AdaptedLayer:
        if layer not in self._layers:
            module = self._parts[layer.part].get_submodule(layer.name)
            self._layers[layer] = adapted = AdaptedLayer(module)
            handle = module.register_forward_hook(
                lambda _, args, output: (
                    output if self._uses is None else adapted.add(args[0], output, self._uses)
                )
            )
            self._handles.append(handle)
        return self._layers[layer]


def _stamp(path: str) -> Stamp | None:
    """None where the file cannot be asked: what is loaded is then used on."""
    try:
        found = lora_file(Path(path)).stat()
    except (ValueError, OSError):
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
