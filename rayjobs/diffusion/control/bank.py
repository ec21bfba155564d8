"""The ControlNets and T2I-Adapters beside one model, and what each row's call is to get of them.

Owns which are loaded, and a row's control pictures. Knows nothing of batches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

from rayjobs.diffusion.control.files import check_fit, locate, outline
from rayjobs.diffusion.control.fitting import as_pixels, fitted
from rayjobs.diffusion.control.t2i import T2IAdapter
from rayjobs.diffusion.model import Model, hold
from rayjobs.diffusion.modules.replay import Replay
from rayjobs.diffusion.modules.upload import upload
from rayjobs.diffusion.request import Control
from rayjobs.images.decode import open_control


class Residuals(NamedTuple):
    """What a ControlNet adds to the skips of a UNet's down blocks, in order, and to its middle."""

    down: tuple[torch.Tensor, ...]
    mid: torch.Tensor


class ControlNet:
    """A loaded ControlNet, without the layers that read pictures: each of these is read once."""

    colours = 3

    def __init__(self, path: str, stamp: tuple[int, ...], sha256: str, net: Any):
        self.path = path
        self.stamp = stamp
        self.sha256 = sha256
        self._read = net.controlnet_cond_embedding
        self._is_bgr = net.config.controlnet_conditioning_channel_order == "bgr"
        net.register_to_config(controlnet_conditioning_channel_order="rgb")
        net.controlnet_cond_embedding = torch.nn.Identity()
        self.net = net

    @cached_property
    def num_bytes(self) -> int:
        parts = self.net, self._read
        return sum(each.nbytes for part in parts for each in part.parameters())

    def check_size(self, width: int, height: int) -> None:
        """Any size will do."""

    @cached_property
    def replay(self) -> Replay:
        """Calls the network by its recording, as the UNet is called."""
        return Replay(self.net, _residuals)

    def read(self, pixels_1CHW: torch.Tensor) -> torch.Tensor:
        """A picture (1, 3, H, W) in 0..1 as the network takes it."""
        weight = next(self._read.parameters())
        pixels_1CHW = upload(pixels_1CHW.to(weight.dtype), weight.device)
        seen_1CHW: torch.Tensor = self._read(pixels_1CHW.flip(1) if self._is_bgr else pixels_1CHW)
        return seen_1CHW


Net = ControlNet | T2IAdapter


@dataclass(eq=False)
class RowControl:
    """One control of a row: of its calls, those from `first` to before `last` get it."""

    net: Net
    scale: float
    first: int
    last: int
    pixels_1CHW: torch.Tensor
    _seen: Any = None

    def is_on(self, position: int) -> bool:
        return self.first <= position < self.last and self.scale != 0

    def seen(self) -> Any:
        """What the network read in the picture, at the first call that gets it."""
        if self._seen is None:
            self._seen = self.net.read(self.pixels_1CHW)
        return self._seen


class ControlBank:
    """The controls loaded beside one model; each is held once, however many rows use it."""

    def __init__(self, model: Model):
        self.model = model
        self._known: dict[str, tuple[tuple[int, ...], str]] = {}
        self._nets: dict[str, Net] = {}

    def load(self, path: str) -> Net:
        """The control in the diffusers folder `path`, read again where it was replaced.

        Raises ValueError when it is none, cannot be read, or is for another model.
        """
        return self.hold(self.find(path) or self.read(path))

    def find(self, path: str) -> Net | None:
        """The same, where it is held and its files are not other ones since."""
        stamp, sha256 = self._known.get(path, ((), ""))
        net = self._nets.get(sha256)
        return net if net is not None and stamp == _stamp(path) else None

    def read(self, path: str) -> Net:
        """The same, not held yet: touches nothing, so that any thread may do it."""
        files = locate(path)
        stamp, net = files.stamp(), outline(files)
        check_fit(files.name, net, self.model.unet, self.model.vae_scale)
        state = {name: it.to(self.model.dtype) for name, it in load_file(files.weights).items()}
        net.load_state_dict(state, assign=True)
        hold(net, self.model)
        kind = ControlNet if files.kind == "ControlNetModel" else T2IAdapter
        return kind(path, stamp, files.sha256, net)

    def hold(self, net: Net) -> Net:
        """Keep one that was read, as the one that was used last."""
        net = self._nets.pop(net.sha256, net)
        self._nets[net.sha256] = net
        self._known[net.path] = net.stamp, net.sha256
        return net

    def held(self) -> list[str]:
        """Hashes, the least recently used first."""
        return list(self._nets)

    def of_row(
        self, controls: Sequence[Control], size: tuple[int, int], num_calls: int
    ) -> tuple[RowControl, ...]:
        """A row's controls, for a picture of this width and height in so many calls.

        Raises ValueError as `load` does, and for a picture that cannot be read.
        """
        made = []
        for control in controls:
            picture = open_control(control.image)
            first, last = interval(control.start, control.end, num_calls)
            net, scale = self.load(control.path), self.model.vae_scale
            net.check_size(*size)
            if control.preprocess is not None:
                picture = fitted(picture, size, scale, control.preprocess)
            picture = picture.convert("L") if net.colours == 1 else picture
            pixels = as_pixels(picture, size, scale)
            made.append(RowControl(net, control.scale, first, last, pixels))
        return tuple(made)

    @property
    def num_bytes(self) -> int:
        return sum(net.num_bytes for net in list(self._nets.values()))

    def forget(self, sha256: str) -> None:
        """Give a control's memory back; rows that use it keep it until they end."""
        del self._nets[sha256]


def interval(start: float, end: float, num_calls: int) -> tuple[int, int]:
    """The first of a row's calls in such a share of them, and the one after the last.

    By the same arithmetic as diffusers' pipelines, to the last bit.
    """
    on = [n for n in range(num_calls) if n / num_calls >= start and (n + 1) / num_calls <= end]
    return (on[0], on[-1] + 1) if on else (0, 0)


def _stamp(path: str) -> tuple[int, ...] | None:
    """None where the files cannot be asked: what is held is then read again, which says why."""
    try:
        return locate(path).stamp()
    except (ValueError, OSError):
        return None


def _residuals(
    net: Any, x_PCHW: torch.Tensor, t_P: torch.Tensor, arguments: dict[str, Any]
) -> tuple[torch.Tensor, ...]:
    """What the network gives, as one tuple whose last tensor is the middle's."""
    down, mid = net(x_PCHW, t_P, return_dict=False, **arguments)
    return (*down, mid)
