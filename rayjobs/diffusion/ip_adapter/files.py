"""An IP-Adapter's file and its image encoder's folder: what they hold, and for which models.

Owns what is refused before a weight is read. Knows nothing of rows or of devices.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import UNet2DConditionModel

from rayjobs.diffusion.files import foreign
from rayjobs.diffusion.files.folder import pickle_message, read_json, refuse_pickles
from rayjobs.diffusion.files.header import Header, read_header
from rayjobs.diffusion.files.identity import sha256_of
from rayjobs.diffusion.weights import Weights

Kind = Literal["plain", "full", "plus"]
KINDS: dict[str, Kind] = {"proj.weight": "plain", "proj.3.weight": "full", "latents": "plus"}
"""By a tensor of the projection that only this kind has."""
NUM_TOKENS = 4
"""Of a plain one, for each picture."""
PROJECTION, LAYERS = "image_proj.", "ip_adapter."
ENCODER = "clip_vision_model"


@dataclass(frozen=True)
class IpAdapterFiles:
    """The files that decide what an IP-Adapter makes of a picture."""

    header: Header
    kind: Kind
    encoder: Path

    @property
    def name(self) -> str:
        return self.header.path.name

    @cached_property
    def sha256(self) -> str:
        each = " ".join(map(sha256_of, (self.header.path, *self._of_encoder)))
        return hashlib.sha256(each.encode()).hexdigest()

    @cached_property
    def encoder_sha256(self) -> str:
        each = " ".join(map(sha256_of, self._of_encoder))
        return hashlib.sha256(each.encode()).hexdigest()

    def stamp(self) -> tuple[int, ...]:
        """Another one where a file was replaced."""
        found = [file.stat() for file in (self.header.path, *self._of_encoder)]
        return tuple(n for each in found for n in (each.st_ino, each.st_size, each.st_mtime_ns))

    @property
    def num_bytes(self) -> int:
        return sum(file.stat().st_size for file in (self.header.path, *self._of_encoder))

    @property
    def _of_encoder(self) -> tuple[Path, Path]:
        return self.encoder / "model.safetensors", self.encoder / "config.json"


def locate(path: str, encoder: str) -> IpAdapterFiles:
    """An adapter and its encoder. Raises ValueError where they are none, or not of each other."""
    file = Path(path)
    if not file.is_file():
        what = "is a folder" if file.is_dir() else "does not exist"
        raise ValueError(f"IP-Adapter {path} {what}; give a .safetensors file")
    if file.suffix != ".safetensors":
        raise ValueError(pickle_message(file))
    header = read_header(file)
    quantized = foreign.quantization(header)
    if quantized is not None:
        raise ValueError(f"IP-Adapter {file.name} holds weights that are {quantized}")
    files = IpAdapterFiles(header, _kind(header), Path(encoder))
    _check_encoder(files)
    return files


def cross_attentions(unet: Any) -> list[Any]:
    """The layers that attend to texts, in the order in which adapters number them."""
    names = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    return [unet.get_submodule(name.removesuffix(".processor")) for name in names]


def layer_names(number: int) -> tuple[str, str]:
    """What makes keys and values of pictures at a layer: adapters count the others, too."""
    stem = f"{LAYERS}{2 * number + 1}"
    return f"{stem}.to_k_ip.weight", f"{stem}.to_v_ip.weight"


def check_fit(files: IpAdapterFiles, unet: Any) -> None:
    """Raise ValueError unless an adapter is made for UNets such as this one."""
    wanted = dict(_wanted(unet))
    given = {name: it.shape for name, it in files.header.tensors.items() if _is_layer(name)}
    for name in sorted(wanted.keys() | given.keys()):
        if wanted.get(name) != given.get(name):
            raise ValueError(
                f"IP-Adapter {files.name} is not for this model: its {name} is "
                f"{given.get(name, 'missing')}, the model's {wanted.get(name, 'missing')}; give "
                "one that was trained for its family"
            )


def check(pairs: Sequence[tuple[Path, Path]], weights: Weights) -> list[str]:
    """The hashes of adapters with their encoders. Raises ValueError unless they fit a model that
    is not loaded.

    Of a single file that is known where its configurations are at hand; else when it is loaded.
    """
    found = [locate(str(path), str(encoder)) for path, encoder in pairs]
    folder = weights.path if weights.single is None else weights.config_folder
    if folder is not None and found:
        with torch.device("meta"):
            unet: Any = UNet2DConditionModel.from_config(weights.unet_config(folder))
        for files in found:
            check_fit(files, unet)
    return [files.sha256 for files in found]


def _kind(header: Header) -> Kind:
    """Raises ValueError for a file that is no IP-Adapter, or one of another kind."""
    if not any(map(_is_layer, header.names)):
        what = foreign.name_of(header.names)
        also = f"; it is {what}" if what else ""
        raise ValueError(f"IP-Adapter {header.path.name} has no {LAYERS} tensors{also}")
    for name, kind in KINDS.items():
        if PROJECTION + name in header.names:
            return kind
    raise ValueError(
        f"IP-Adapter {header.path.name} is of a kind that is not read, such as FaceID, which needs "
        "another program to find faces; give a plain, plus or full one"
    )


def _is_layer(name: str) -> bool:
    return name.startswith(LAYERS)


def _wanted(unet: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    for number, layer in enumerate(cross_attentions(unet)):
        own = (layer.to_k, layer.to_v)
        for name, module in zip(layer_names(number), own, strict=True):
            yield name, tuple(module.weight.shape)


def _check_encoder(files: IpAdapterFiles) -> None:
    folder = files.encoder
    if not folder.is_dir():
        what = "is a file" if folder.is_file() else "does not exist"
        raise ValueError(
            f"image encoder {folder} {what}; give its folder, of config.json and model.safetensors"
        )
    refuse_pickles([folder])
    config = read_json(folder / "config.json")
    if config.get("model_type") != ENCODER:
        raise ValueError(
            f"image encoder {folder} is a {config.get('model_type')}; give a "
            "CLIPVisionModelWithProjection"
        )
    read_header(folder / "model.safetensors")
    key = "projection_dim" if files.kind == "plain" else "hidden_size"
    name = {"plain": "proj.weight", "full": "proj.0.weight", "plus": "proj_in.weight"}[files.kind]
    shape = files.header.shape(PROJECTION + name) or (0,)
    if shape[-1] != config.get(key):
        raise ValueError(
            f"IP-Adapter {files.name} is not for the image encoder {folder.name}: it reads "
            f"{shape[-1]} numbers, the encoder's {key} is {config.get(key)}; give the encoder that "
            "it was trained with"
        )
