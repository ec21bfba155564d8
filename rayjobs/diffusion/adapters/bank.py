"""The adapters beside one model, that differ from row to row of one call.

Owns which adapters are loaded and the hooks that apply them to the layers. Knows nothing of
requests.
"""

import contextlib
import itertools
import math
import weakref
from collections import defaultdict
from collections.abc import Collection, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from rayjobs.diffusion.adapters.change import Change
from rayjobs.diffusion.adapters.layer import AdaptedLayer, Group, Use, changed_weight
from rayjobs.diffusion.adapters.names import Layer, Layers
from rayjobs.diffusion.adapters.packed import Gathering
from rayjobs.diffusion.adapters.placed import PlacedAdapter, place
from rayjobs.diffusion.adapters.reader import Adapter, read
from rayjobs.diffusion.facts import Usual, distilled_sampler
from rayjobs.diffusion.files.beside import lora_file
from rayjobs.diffusion.model import Model
from rayjobs.diffusion.modules.pipeline import scheduler_config
from rayjobs.diffusion.modules.replay import Beside
from rayjobs.diffusion.modules.upload import upload

LoraUse = tuple[tuple[str, float], ...]
"""A row's adapters: (SHA-256 of the file, scale), in order."""

Stamp = tuple[int, int, int]
"""A file's identity, size and time of change."""

MAX_GATHERED_BYTES = 2 * 2**30
"""Of a call's factors: more than these are gathered layer by layer, again in each call."""


@dataclass(eq=False)
class Gathered:
    """What the slots of a call use at each layer, ready for as many calls as use the same."""

    uses: list[tuple[AdaptedLayer, Use]] = field(default_factory=list)
    beside: Beside | None = None
    """The factors as inputs of a recording; None where one cannot take them."""
    num_bytes: int = 0

    @contextlib.contextmanager
    def applied(self) -> Generator[None]:
        """Within this context, slot p of every call runs with its adapters."""
        for layer, use in self.uses:
            layer.use = use
        try:
            yield
        finally:
            for layer, _ in self.uses:
                layer.use = None


class LoraBank:
    """The adapters loaded beside one model; each is held once, however many rows use it.

    `exact`, a row's bits depend neither on its neighbours' adapters nor on how products and sums
    could be taken together.
    """

    def __init__(self, model: Model, *, exact: bool = True):
        self.model = model
        self.exact = exact
        self._known: dict[str, tuple[Stamp | None, str]] = {}
        self._adapters: dict[str, PlacedAdapter] = {}
        self._layers: dict[Layer, AdaptedLayer] = {}
        self._gathered: weakref.WeakSet[Gathered] = weakref.WeakSet()
        self._handles: list[Any] = []
        self.fused: tuple[tuple[str, float], ...] = ()
        """Those in the model's weights, by path and scale."""
        self._fused: LoraUse | None = None
        self._own: list[tuple[Any, str, torch.Tensor | None]] = []
        """Parameters of the model itself, where adapters are in their place."""

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
        return self.admit(self.place(self.read(path)))

    def read(self, path: str) -> Adapter:
        """The adapter at `path`, not usable yet: touches no layer, so that any thread may do it.

        Raises ValueError as `load` does.
        """
        return read(path, lora_file(Path(path)), self.layers)

    def place(self, adapter: Adapter) -> PlacedAdapter:
        """Bring an adapter that was read for this model to its device, which any thread may do."""
        modules = {layer: self._module(layer) for layer in adapter.changes}
        return place(adapter, modules, self.model.unet.conv_in.weight)

    def admit(self, placed: PlacedAdapter) -> str:
        """Make an adapter usable, between two steps; its SHA-256."""
        if placed.sha256 not in self._adapters:
            placed.wait()
            for layer in placed.layers:
                self._hook(layer)
            self._adapters[placed.sha256] = placed
        self._known[placed.path] = (_stamp(placed.path), placed.sha256)
        return placed.sha256

    def use_of(self, loras: Iterable[tuple[str, float]]) -> LoraUse:
        """A row's adapters by path and scale, loaded. Raises ValueError as `load` does, and for
        others than those that are in the model's weights."""
        use = tuple((self.load(path), scale) for path, scale in loras)
        if self._fused is not None and use != self._fused:
            raise ValueError("the model's weights hold other adapters; give every row those")
        return use

    def fuse(self, loras: Sequence[tuple[str, float]]) -> LoraUse:
        """Put adapters into the weights of the model, for rows that all use these.

        Calls then take no longer than without adapters. The weights are rounded to the model's
        dtype, so that a picture's last bits are others. `detach` takes them out again.
        """
        if self._fused is not None or self._adapters:
            raise ValueError("adapters are loaded already; fuse them before others are")
        read = [(self.read(path), scale) for path, scale in loras]
        changes: dict[Layer, list[tuple[Change, float]]] = defaultdict(list)
        for adapter, scale in read:
            for layer, change in adapter.changes.items():
                if scale:
                    changes[layer].append((change, scale))
        for layer, of_layer in changes.items():
            self._replace(self._module(layer), of_layer)
        self.model.forget_calls()
        self.fused = tuple(loras)
        self._fused = tuple((self.admit(PlacedAdapter.fused(it)), scale) for it, scale in read)
        return self._fused

    def warnings(self, use: LoraUse) -> tuple[str, ...]:
        """What was not done as a row's adapters and scales may have meant it."""
        said: list[str] = []
        for sha256, scale in use:
            adapter = self._adapters[sha256].adapter
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

    def differs(self, use: LoraUse) -> bool:
        """Whether rows of such a use have adapters beside the model's weights."""
        return bool(use) and self._fused is None

    @property
    def num_bytes(self) -> int:
        """Of all adapters, and of what is gathered of them for calls."""
        held = (*list(self._adapters.values()), *list(self._gathered))
        return sum(each.num_bytes for each in held)

    def forget(self, sha256: str) -> None:
        """Give an adapter's memory back; no row may be using it."""
        del self._adapters[sha256]
        self._known = {path: known for path, known in self._known.items() if known[1] != sha256}

    def detach(self) -> None:
        """Leave the model as it was, for whoever uses its parts on."""
        for handle in self._handles:
            handle.remove()
        for module, name, own in self._own:
            _set(module, name, own)
        if self._own:
            self.model.forget_calls()

    def gather(self, slots: Sequence[LoraUse], parts: Collection[str] | None = None) -> Gathered:
        """What slots use of these parts of the model, or of all, while they use the same."""
        if not any(map(self.differs, slots)):
            return Gathered(beside=Beside())
        uses: dict[AdaptedLayer, Use] = defaultdict(Use)
        found = [
            self._gathering(slots, part) for part in self._parts if parts is None or part in parts
        ]
        num_bytes = sum(each.num_bytes for each in found)
        has_room = num_bytes <= MAX_GATHERED_BYTES
        for gathering in found:
            for layer, (down, up) in gathering.all_factors().items() if has_room else ():
                uses[self._layers[layer]].factors = {"down": down, "up": up}
            for layer in () if has_room else gathering.ranks:
                uses[self._layers[layer]].late = partial(gathering.factors_of, layer)
        self._add_changes(slots, parts, uses)
        beside = _beside(uses, found) if has_room else None
        gathered = Gathered(list(uses.items()), beside, num_bytes if has_room else 0)
        self._gathered.add(gathered)
        return gathered

    def applied(
        self, slots: Sequence[LoraUse], parts: Collection[str] | None = None
    ) -> contextlib.AbstractContextManager[None]:
        """Within this context, slot p of every call runs with the adapters of `slots[p]`."""
        return self.gather(slots, parts).applied()

    @property
    def _parts(self) -> dict[str, Any]:
        encoders = zip(("text_encoder", "text_encoder_2"), self.model.text_encoders, strict=False)
        return {"unet": self.model.unet, **dict(encoders)}

    def _distilled(self, use: LoraUse) -> Usual | None:
        found = [self._adapters[sha256].adapter.usual for sha256, scale in use if scale]
        return next(filter(None, found), None)

    def _gathering(self, slots: Sequence[LoraUse], part: str) -> Gathering:
        step = 1 if self.exact else _shared_length(slots)
        rows = [
            tuple((self._adapters[sha256].blocks.get(part), scale) for sha256, scale in use)
            for use in slots[::step]
        ]
        return Gathering(rows, exact=self.exact)

    def _add_changes(
        self,
        slots: Sequence[LoraUse],
        parts: Collection[str] | None,
        uses: dict[AdaptedLayer, Use],
    ) -> None:
        """Slots by adapter and scale, each at most once in a group; not of low-rank ones alone."""
        members: dict[tuple[str, float, int], list[int]] = {}
        for slot, use in enumerate(slots):
            for position, (sha256, scale) in enumerate(use):
                if scale and self._adapters[sha256].changes:  # a DoRA at 0 too is as if not there
                    nth = use[:position].count((sha256, scale))
                    members.setdefault((sha256, scale, nth), []).append(slot)
        for (sha256, scale, _), found in members.items():
            group = Group(scale, self._slots(found, len(slots)))
            for layer, change in self._adapters[sha256].changes.items():
                if parts is None or layer.part in parts:
                    uses[self._layers[layer]].changes.append((group, change))

    def _slots(self, members: list[int], num_slots: int) -> torch.Tensor | None:
        if len(members) == num_slots:
            return None
        return upload(torch.tensor(members), self.model.device)

    def _replace(self, module: Any, changes: Sequence[tuple[Change, float]]) -> None:
        """Another weight and bias in a module; its own wait on the host."""
        weight, bias = changed_weight(module, changes)
        for name, value in (("weight", weight), ("bias", bias)):
            own = getattr(module, name)
            self._own.append((module, name, None if own is None else own.cpu()))
            _set(module, name, value)

    def _module(self, layer: Layer) -> Any:
        return self._parts[layer.part].get_submodule(layer.name)

    def _hook(self, layer: Layer) -> None:
        if layer not in self._layers:
            module = self._module(layer)
            self._layers[layer] = adapted = AdaptedLayer(module, exact=self.exact)
            self._handles.append(
                module.register_forward_hook(
                    lambda _, args, output: (
                        output if adapted.use is None else adapted.add(args[0], output, adapted.use)
                    )
                )
            )


def _set(module: Any, name: str, value: torch.Tensor | None) -> None:
    if value is not None:
        value = torch.nn.Parameter(value.to(module.weight.device), requires_grad=False)
    setattr(module, name, value)


def _shared_length(slots: Sequence[LoraUse]) -> int:
    """Slots that use the same lie together in runs of a multiple of so many."""
    return math.gcd(*(len(list(run)) for _, run in itertools.groupby(slots)))


def _beside(uses: dict[AdaptedLayer, Use], found: Sequence[Gathering]) -> Beside | None:
    """The factors as inputs of a recording, which is for linear layers and nothing else."""
    if any(use.changes or layer.module.weight.ndim > 2 for layer, use in uses.items()):
        return None
    places = tuple((use.factors, name) for use in uses.values() for name in use.factors)
    layouts = [each.layout for each in found if each.ranks]
    names = " ".join(layout.layers for layout in layouts)
    return Beside(places, names, (len(found[0].rows), *(layout.shapes for layout in layouts)))


def _stamp(path: str) -> Stamp | None:
    """None where the file cannot be asked: what is loaded is then used on."""
    try:
        found = lora_file(Path(path)).stat()
    except (ValueError, OSError):
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
