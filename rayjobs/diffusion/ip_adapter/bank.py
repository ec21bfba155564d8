"""The IP-Adapters beside one model, and what the UNet's layers attend to in each row's pictures.

Owns which are loaded, and the keys and values of pictures, which are computed once for all steps.
Knows nothing of batches. Legend: T tokens of a picture, D width.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection

from rayjobs.diffusion.ip_adapter.files import (
    PROJECTION,
    IpAdapterFiles,
    check_fit,
    cross_attentions,
    layer_names,
    locate,
)
from rayjobs.diffusion.model import Model
from rayjobs.diffusion.modules.upload import upload
from rayjobs.diffusion.request import IpAdapter
from rayjobs.images.decode import open_reference

MAX_PICTURES = 16
"""Of each adapter, whose keys and values are kept for the next row that has the same."""
Seen = tuple[tuple[torch.Tensor, torch.Tensor], ...]
"""Keys and values (1, T, D) for each layer."""


class ImageEncoder:
    """A CLIP vision model, which several adapters may have in common."""

    def __init__(self, sha256: str, net: Any):
        self.sha256 = sha256
        self.net = net
        side = net.config.image_size
        self._processor = CLIPImageProcessorPil(size=side, crop_size=side)

    @property
    def num_bytes(self) -> int:
        return sum(each.nbytes for each in self.net.parameters())

    def read(self, picture: Image.Image | None, deep: bool) -> torch.Tensor:
        """A picture's embedding, or those of its patches, of the layer before the last. Without a
        picture they are zeros, or those of zeros: what guidance leads away from."""
        if picture is None and not deep:
            width = self.net.config.projection_dim
            return torch.zeros(1, width, dtype=self.net.dtype, device=self.net.device)
        some = Image.new("RGB", (1, 1)) if picture is None else picture
        pixels_1CHW = self._processor(some, return_tensors="pt").pixel_values
        pixels_1CHW = upload(pixels_1CHW.to(self.net.dtype), self.net.device)
        pixels_1CHW = torch.zeros_like(pixels_1CHW) if picture is None else pixels_1CHW
        given = self.net(pixels_1CHW, output_hidden_states=deep)
        seen: torch.Tensor = given.hidden_states[-2] if deep else given.image_embeds
        return seen


class LoadedIpAdapter:
    """An adapter in memory, with its encoder."""

    def __init__(
        self,
        files: IpAdapterFiles,
        stamp: tuple[int, ...],
        encoder: ImageEncoder,
        projection: Any,
        layers: Sequence[tuple[torch.Tensor, torch.Tensor]],
    ):
        self.key = str(files.header.path), str(files.encoder)
        self.stamp = stamp
        self.sha256 = files.sha256
        self.encoder = encoder
        self._is_deep = files.kind != "plain"
        self._projection = projection
        self._layers = layers
        self._seen: OrderedDict[str, Seen] = OrderedDict()

    @property
    def path(self) -> str:
        return self.key[0]

    @cached_property
    def own_bytes(self) -> int:
        """Without its encoder."""
        of_layers = (each.nbytes for pair in self._layers for each in pair)
        return sum(of_layers) + sum(each.nbytes for each in self._projection.parameters())

    @cached_property
    def nothing(self) -> Seen:
        """What slots of the negative text attend to."""
        return self._attended(None)

    def see(self, picture: Image.Image, sha256: str) -> Seen:
        """What other slots attend to in a picture, which is known by its hash."""
        seen = self._seen.pop(sha256, None)
        self._seen[sha256] = seen = self._attended(picture) if seen is None else seen
        while len(self._seen) > MAX_PICTURES:
            self._seen.popitem(last=False)
        return seen

    def _attended(self, picture: Image.Image | None) -> Seen:
        x_1TD = self._projection(self.encoder.read(picture, self._is_deep))
        return tuple((F.linear(x_1TD, k), F.linear(x_1TD, v)) for k, v in self._layers)


@dataclass(eq=False)
class RowIpAdapter:
    """One of a row's pictures, with the adapter that reads it."""

    net: LoadedIpAdapter
    scale: float
    picture: Image.Image
    _seen: Seen | None = field(default=None, repr=False)

    def seen(self, *, negative: bool) -> Seen:
        """Read at the first call that attends to it."""
        if negative:
            return self.net.nothing
        if self._seen is None:
            data = f"{self.picture.size} ".encode() + self.picture.tobytes()
            self._seen = self.net.see(self.picture, hashlib.sha256(data).hexdigest())
        return self._seen


class IpAdapterBank:
    """The adapters loaded beside one model; each is held once, however many rows use it."""

    def __init__(self, model: Model):
        self.model = model
        self._known: dict[tuple[str, str], str] = {}
        self._nets: dict[str, LoadedIpAdapter] = {}

    def load(self, path: str, encoder: str) -> LoadedIpAdapter:
        """The adapter in the file `path` with the encoder in a folder, read again where one was
        replaced. Raises ValueError when they are none, cannot be read, or are for another model."""
        return self.hold(self.find(path, encoder) or self.read(path, encoder))

    def find(self, path: str, encoder: str) -> LoadedIpAdapter | None:
        """The same, where it is held and its files are not other ones since."""
        net = self._nets.get(self._known.get((path, encoder), ""))
        return net if net is not None and net.stamp == _stamp(path, encoder) else None

    def read(self, path: str, encoder: str) -> LoadedIpAdapter:
        """The same, not held yet: touches nothing, so that any thread may do it."""
        files = locate(path, encoder)
        check_fit(files, self.model.unet)
        stamp, state = files.stamp(), load_file(files.header.path)
        held = (net.encoder for net in list(self._nets.values()))
        known = next((each for each in held if each.sha256 == files.encoder_sha256), None)
        names = map(layer_names, range(len(cross_attentions(self.model.unet))))
        layers = [(self._placed(state[k]), self._placed(state[v])) for k, v in names]
        parts = {
            name.removeprefix(PROJECTION): tensor
            for name, tensor in state.items()
            if name.startswith(PROJECTION)
        }
        projection = self._placed(_projection(files, parts))
        return LoadedIpAdapter(files, stamp, known or self._encoder(files), projection, layers)

    def hold(self, net: LoadedIpAdapter) -> LoadedIpAdapter:
        """Keep one that was read, as the one that was used last."""
        net = self._nets.pop(net.sha256, net)
        self._nets[net.sha256] = net
        self._known[net.key] = net.sha256
        return net

    def held(self) -> list[str]:
        """Hashes, the least recently used first."""
        return list(self._nets)

    def of_row(self, uses: Sequence[IpAdapter]) -> tuple[RowIpAdapter, ...]:
        """A row's adapters. Raises ValueError as `load` does, and for a picture that cannot be
        read."""
        return tuple(
            RowIpAdapter(self.load(use.path, use.encoder), use.scale, open_reference(use.image))
            for use in uses
        )

    @property
    def num_bytes(self) -> int:
        nets = list(self._nets.values())
        encoders = {net.encoder.sha256: net.encoder.num_bytes for net in nets}
        return sum(net.own_bytes for net in nets) + sum(encoders.values())

    def forget(self, sha256: str) -> None:
        """Give an adapter's memory back; rows that use it keep it until they end."""
        del self._nets[sha256]

    def _encoder(self, files: IpAdapterFiles) -> ImageEncoder:
        kind: Any = CLIPVisionModelWithProjection
        net, info = kind.from_pretrained(
            files.encoder,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
        if missing := sorted(info["missing_keys"]):
            raise ValueError(
                f"image encoder {files.encoder} lacks {len(missing)} weights, such as {missing[0]}"
            )
        return ImageEncoder(files.encoder_sha256, self._placed(net))

    def _placed(self, it: Any) -> Any:
        """A tensor or a module as the model's own are kept."""
        it = it.to(device=self.model.device, dtype=self.model.dtype)
        return it.eval().requires_grad_(False) if isinstance(it, torch.nn.Module) else it


def _projection(files: IpAdapterFiles, state: dict[str, torch.Tensor]) -> Any:
    """What makes tokens of a picture's embedding; diffusers knows the names."""
    kind: Any = UNet2DConditionModel
    try:
        # It needs a UNet's device and dtype only where memory is to be spared.
        return kind._convert_ip_adapter_image_proj_to_diffusers(None, state, False)
    except Exception as error:  # whatever a file may hold
        raise ValueError(f"IP-Adapter {files.name} cannot be read: {error}"[:300]) from None


def _stamp(path: str, encoder: str) -> tuple[int, ...] | None:
    """None where the files cannot be asked: what is held is then read again, which says why."""
    try:
        return locate(path, encoder).stamp()
    except (ValueError, OSError):
        return None
