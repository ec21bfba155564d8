"""LoRA adapters that differ from row to row of one call.

Owns reading adapter files and the gathered low-rank products: row b of a layer's output gets
`scale_b * (x_b A_b^T) B_b^T` (arXiv 2106.09685, eq. 3), with the factors of the row's own adapters.
Knows nothing of requests. Legend: P slots, K adapters of a row, R rank, T tokens, I in, O out.
"""

import contextlib
import hashlib
import re
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.loaders import StableDiffusionLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin

from rayjobs.diffusion.model import Model
from rayjobs.diffusion.weights import lora_file

LoraUse = tuple[tuple[str, float], ...]
"""A row's adapters: (SHA-256 of the file, scale), in order."""

FACTOR = re.compile(
    r"(?P<part>unet|text_encoder_2|text_encoder)\.(?P<module>.+?)(?:\.processor)?"
    r"(?:\.lora|_lora|\.lora_linear_layer)?[._](?:lora_)?(?P<factor>A|B|down|up)(?:\.\w+)?\.weight"
)


Factors = dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor]]
"""A (R, I...) and B (O, R) by part and layer."""


@dataclass(frozen=True)
class Adapter:
    """An adapter file that has been read."""

    path: str
    file: Path
    sha256: str
    factors: Factors


class LoraBank:
    """The adapters loaded beside one model; each is held once, however many rows use it."""

    def __init__(self, model: Model):
        self.model = model
        self._paths: dict[str, str] = {}
        self._numbers: dict[str, int] = {"": 0}  # adapter 0 is all zeros: a row without one
        self._free: list[int] = []
        self._layers: dict[str, _LoraLayer] = {}
        self._rows: tuple[torch.Tensor, torch.Tensor] | None = None
        self._known_uses: tuple[list[LoraUse], torch.Tensor, torch.Tensor] | None = None
        self._handles: list[Any] = []

    def load(self, path: str) -> str:
        """Make the adapter at `path` (a safetensors file or its folder) usable; return its SHA-256.

        Raises ValueError when the file is missing, is no LoRA, or does not fit the model.
        """
        return self._paths[path] if path in self._paths else self.admit(self.read(path))

    def read(self, path: str) -> "Adapter":
        """The adapter at `path`, not usable yet: touches no layer, so that any thread may do it.

        Raises ValueError when the file is missing or is no LoRA.
        """
        file = lora_file(Path(path))
        with file.open("rb") as opened:
            sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
        return Adapter(path, file, sha256, self._read(file))

    def admit(self, adapter: "Adapter") -> str:
        """Make an adapter usable, between two steps; return its SHA-256.

        Raises ValueError when it does not fit the model.
        """
        if adapter.sha256 not in self._numbers:
            placed = [
                (self._layer(part, name, adapter.file), *factors)
                for (part, name), factors in adapter.factors.items()
            ]
            for layer, down, up in placed:  # all of it fits, or nothing of it is kept
                layer.check(down, up, adapter.file)
            number = self._free.pop() if self._free else len(self._numbers)
            try:
                for layer, down, up in placed:
                    layer.put(number, down, up)
            except BaseException:
                self._release(number)
                raise
            self._numbers[adapter.sha256] = number
        self._paths[adapter.path] = adapter.sha256
        return adapter.sha256

    @property
    def num_bytes(self) -> int:
        """Of all adapters, as they are stacked and padded."""
        layers = list(self._layers.values())
        return sum(layer.down.nbytes + layer.up.nbytes for layer in layers)

    def forget(self, sha256: str) -> None:
        """Free an adapter's index for the next one; no row may be using it."""
        self._release(self._numbers.pop(sha256))
        self._paths = {path: known for path, known in self._paths.items() if known != sha256}

    def detach(self) -> None:
        """Leave the model as it was, for whoever uses its parts on."""
        for handle in self._handles:
            handle.remove()

    def _release(self, number: int) -> None:
        for layer in self._layers.values():
            layer.clear(number)
        self._free.append(number)
        self._known_uses = None

    @contextlib.contextmanager
    def applied(self, uses: Sequence[LoraUse]) -> Generator[None]:
        """Within this context, slot p of every call runs with the adapters of `uses[p]`."""
        if not any(uses):
            yield
            return
        self._rows = self._tensors(uses)
        try:
            yield
        finally:
            self._rows = None

    def _tensors(self, uses: Sequence[LoraUse]) -> tuple[torch.Tensor, torch.Tensor]:
        """Numbers and scales (P, K); kept while the uses stay, since copying waits for a GPU."""
        if self._known_uses is None or self._known_uses[0] != list(uses):
            width = max(len(use) for use in uses)
            padded = [[*use, *[("", 0.0)] * (width - len(use))] for use in uses]
            numbers = torch.tensor([[self._numbers[sha] for sha, _ in row] for row in padded])
            scales = torch.tensor([[s for _, s in row] for row in padded], dtype=torch.float32)
            device = self.model.device
            self._known_uses = (list(uses), numbers.to(device), scales.to(device))
        return self._known_uses[1:]

    def _layer(self, part: str, name: str, file: Path) -> "_LoraLayer":
        key = f"{part}.{name}"
        if key not in self._layers:
            module = _find_module(self.model, part, name)
            if module is None:
                raise ValueError(f"LoRA {file.name} is for another model: it has no layer {key}")
            self._layers[key] = layer = _LoraLayer(module)
            handle = module.register_forward_hook(
                lambda _, args, output: (
                    output if self._rows is None else layer.add(args[0], output, *self._rows)
                )
            )
            self._handles.append(handle)
        return self._layers[key]

    def _read(self, file: Path) -> Factors:
        """Factors A (R, I) and B (O, R) by layer, B with the file's own alpha / rank folded in."""
        mixin: Any = (
            StableDiffusionXLLoraLoaderMixin
            if self.model.family == "sdxl"
            else StableDiffusionLoraLoaderMixin
        )
        try:
            tensors, alphas, metadata = mixin.lora_state_dict(
                str(file), unet_config=self.model.unet.config, return_lora_metadata=True
            )
        except Exception as error:
            raise ValueError(f"LoRA {file} cannot be read: {str(error).splitlines()[0]}") from error
        halves: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
        for key, tensor in tensors.items():
            match = FACTOR.fullmatch(key)
            if match is None:
                raise ValueError(f"LoRA {file.name} has {key!r}, which is no plain LoRA factor")
            half = "down" if match["factor"] in ("A", "down") else "up"
            key = (match["part"], _plain(match["part"], match["module"]))
            halves.setdefault(key, {})[half] = tensor
        alphas = {_of_alpha(key): alpha for key, alpha in (alphas or {}).items()}
        if not halves or any(len(pair) != 2 for pair in halves.values()):
            raise ValueError(f"{file} is not a LoRA: it has no pairs of down and up factors")
        return {
            (part, name): (pair["down"], pair["up"] * _strength(part, name, pair, alphas, metadata))
            for (part, name), pair in halves.items()
        }


class _LoraLayer:
    """One layer's factors, stacked over adapters and padded with zeros to one rank."""

    def __init__(self, module: torch.nn.Module):
        if not isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            raise ValueError(f"LoRA on a {type(module).__name__} is not supported")
        self.module = module
        self.down = module.weight.new_zeros(1, 0, *module.weight.shape[1:])  # (N, R, I...)
        self.up = module.weight.new_zeros(1, module.weight.shape[0], 0)  # (N, O, R)

    def check(self, down: torch.Tensor, up: torch.Tensor, file: Path) -> None:
        """Raise ValueError unless these factors are for a layer of this size."""
        fits = (
            down.ndim == self.module.weight.ndim
            and down.shape[1:] == self.down.shape[2:]
            and tuple(up.flatten(1).shape) == (self.up.shape[1], down.shape[0])
        )
        if not fits:
            raise ValueError(
                f"LoRA {file.name} is for another model: factors {tuple(down.shape)} and "
                f"{tuple(up.shape)} do not fit a weight {tuple(self.module.weight.shape)}"
            )

    def put(self, number: int, down: torch.Tensor, up: torch.Tensor) -> None:
        up = up.flatten(1)
        num = max(number + 1, len(self.down))
        rank = max(down.shape[0], self.down.shape[1])
        downs = self.down.new_zeros(num, rank, *self.down.shape[2:])
        ups = self.up.new_zeros(num, self.up.shape[1], rank)
        downs[: len(self.down), : self.down.shape[1]] = self.down
        ups[: len(self.up), :, : self.up.shape[2]] = self.up
        downs[number, : down.shape[0]] = down.to(downs)
        ups[number, :, : up.shape[1]] = up.to(ups)
        self.down, self.up = downs, ups

    def clear(self, number: int) -> None:
        if number < len(self.down):
            self.down[number], self.up[number] = 0, 0

    def add(
        self, x: torch.Tensor, y: torch.Tensor, numbers_PK: torch.Tensor, scales_PK: torch.Tensor
    ) -> torch.Tensor:
        """`y` plus each slot's own low-rank product of `x`."""
        known = numbers_PK < len(self.down)  # later adapters do not touch this layer
        numbers_PK = numbers_PK * known
        down = self.down[numbers_PK].flatten(1, 2)  # (P, K R, I...)
        up_POR = self.up[numbers_PK].transpose(1, 2).flatten(2)  # (P, O, K R)
        rank = self.down.shape[1]
        scale_PR = (scales_PK * known).repeat_interleave(rank, dim=1).to(y.dtype)
        up_PRO = up_POR.transpose(1, 2) * scale_PR[:, :, None]
        # Products first, then the sum: adding exact zeros keeps the bits of a row without adapters.
        if isinstance(self.module, torch.nn.Conv2d):
            h_PRT = _grouped_conv(x, down, self.module).flatten(2)
            return y + torch.bmm(up_PRO.transpose(1, 2), h_PRT).view(y.shape)
        h_PTR = torch.bmm(x.reshape(len(x), -1, x.shape[-1]), down.transpose(1, 2))
        return y + torch.bmm(h_PTR, up_PRO).view(y.shape)


def _grouped_conv(x: torch.Tensor, down: torch.Tensor, module: torch.nn.Conv2d) -> torch.Tensor:
    """Each slot convolved with its own kernels: slots become groups of one call."""
    slots, rank = down.shape[:2]
    x = x.reshape(1, -1, *x.shape[2:])
    h = F.conv2d(x, down.flatten(0, 1), None, module.stride, module.padding, groups=slots)
    return h.view(slots, rank, *h.shape[2:])


def _plain(part: str, name: str) -> str:
    """A layer's name in the model, for one as diffusers' attention processors once had it."""
    name = name.replace(".processor.", ".")
    if not part.startswith("text"):
        return f"{name}.0" if name.endswith(".to_out") else name
    return re.sub(r"\.to_(q|k|v|out)$", r".\1_proj", name)


def _of_alpha(key: str) -> str:
    """The layer, with its part, that an alpha of diffusers' converter is for."""
    whole = key.removesuffix(".alpha")
    match = FACTOR.fullmatch(whole)
    if match is None:
        return whole
    return f"{match['part']}.{_plain(match['part'], match['module'])}"


def _strength(
    part: str,
    name: str,
    pair: dict[str, torch.Tensor],
    alphas: dict[str, Any],
    metadata: dict[str, Any] | None,
) -> float:
    """alpha / rank: from the layer's own alpha, else the file's metadata, else 1."""
    rank = pair["down"].shape[0]
    alpha = alphas.get(f"{part}.{name}")
    if alpha is None:
        patterns = (metadata or {}).get(f"{part}.alpha_pattern") or {}
        matching = [value for key, value in patterns.items() if name.endswith(key)]
        alpha = matching[0] if matching else (metadata or {}).get(f"{part}.lora_alpha", rank)
    return float(alpha) / rank


def _find_module(model: Model, part: str, name: str) -> torch.nn.Module | None:
    """The layer of that name; transformers 5.6 dropped `text_model.` from the first encoder's."""
    encoders = dict(zip(("text_encoder", "text_encoder_2"), model.text_encoders, strict=False))
    root: Any = model.unet if part == "unet" else encoders.get(part)
    for candidate in (name, name.removeprefix("text_model."), f"text_model.{name}"):
        try:
            layer: torch.nn.Module = root.get_submodule(candidate)
            return layer
        except AttributeError:
            continue
    return None
