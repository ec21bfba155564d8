"""A control's folder: which of its files count, and whether they are for a model.

Owns what is refused before a weight is read. Knows nothing of rows or of devices.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, T2IAdapter, UNet2DConditionModel

from rayjobs.diffusion import facts
from rayjobs.diffusion.control import t2i
from rayjobs.diffusion.files import foreign
from rayjobs.diffusion.files.folder import read_json, refuse_pickles
from rayjobs.diffusion.files.header import read_header
from rayjobs.diffusion.files.identity import sha256_of
from rayjobs.diffusion.weights import Weights

STEM = "diffusion_pytorch_model"
STARTER = Path(__file__).parents[2] / "starter" / "outlines"
COLOURS = 3
KINDS: dict[str, Any] = {"ControlNetModel": ControlNetModel, "T2IAdapter": T2IAdapter}
NOT_READ = ("global_pool_conditions", "class_embed_type", "encoder_hid_dim_type")
"""Settings of ControlNets that need another way of guidance, or inputs that no row has."""
ALIKE = (
    *("block_out_channels", "layers_per_block", "in_channels", "cross_attention_dim"),
    *("addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim"),
)
"""Settings that a ControlNet has in common with the UNets that it is for."""


@dataclass(frozen=True)
class ControlFiles:
    """The two files that decide what a control computes."""

    config: Path
    weights: Path
    kind: str = "ControlNetModel"

    @property
    def name(self) -> str:
        return self.config.parent.name

    @property
    def title(self) -> str:
        what = "ControlNet" if self.kind == "ControlNetModel" else "T2I-Adapter"
        return f"{what} {self.name}"

    @property
    def sha256(self) -> str:
        both = f"{sha256_of(self.weights)} {sha256_of(self.config)}"
        return hashlib.sha256(both.encode()).hexdigest()

    def stamp(self) -> tuple[int, ...]:
        """Another one where a file was replaced."""
        found = [file.stat() for file in (self.config, self.weights)]
        return tuple(n for each in found for n in (each.st_ino, each.st_size, each.st_mtime_ns))


def locate(path: str) -> ControlFiles:
    """The files in a diffusers folder, or of `starter`, which follows outlines with that model.

    Raises ValueError where it is none of a control.
    """
    folder = STARTER if path == "starter" else Path(path)
    if not folder.is_dir():
        what = "is a file" if folder.is_file() else "does not exist"
        raise ValueError(
            f"ControlNet {path} {what}; give a diffusers folder, of config.json and "
            f"{STEM}.safetensors"
        )
    refuse_pickles([folder])
    kind = read_json(folder / "config.json").get("_class_name")
    if kind not in KINDS:
        names = " or a ".join(KINDS)
        raise ValueError(f"ControlNet {path} is a {kind}; only a {names} is read")
    whole = folder / f"{STEM}.safetensors"
    files = [whole] if whole.is_file() else sorted(folder.glob(f"{STEM}*.safetensors"))
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "no weights"
        raise ValueError(f"ControlNet {path} holds {names}; keep a single {STEM}.safetensors")
    return ControlFiles(folder / "config.json", files[0], kind)


def outline(files: ControlFiles) -> Any:
    """The network without weights. Raises ValueError unless its file has just those it asks for."""
    config = read_json(files.config)
    try:
        with torch.device("meta"):
            net: Any = KINDS[files.kind].from_config(config)
    except Exception as error:  # whatever a configuration may say
        raise ValueError(f"{files.title}: its config.json is none: {error}") from None
    header = read_header(files.weights)
    quantized = foreign.quantization(header)
    if quantized is not None:
        raise ValueError(f"{files.title} holds weights that are {quantized}")
    wanted = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    given = {name: it.shape for name, it in header.tensors.items()}
    for name in sorted(wanted.keys() | given.keys()):
        if wanted.get(name) != given.get(name):
            raise ValueError(
                f"{files.title}: {name} is {given.get(name, 'missing')} in its file, "
                f"{wanted.get(name, 'unknown')} by its config.json"
            )
    return net


def check_fit(name: str, net: Any, unet: Any, vae_scale: int) -> None:
    """Raise ValueError unless a control is made for UNets such as this one."""
    if isinstance(net, T2IAdapter):
        t2i.check_fit(name, net, unet.config, vae_scale)
        return
    own, others = net.config, unet.config
    for key in NOT_READ:
        if own.get(key):
            raise ValueError(f"ControlNet {name} has {key} {own[key]}, which is not supported")
    if own["conditioning_channels"] != COLOURS:
        raise ValueError(
            f"ControlNet {name} takes pictures of {own['conditioning_channels']} channels, not 3"
        )
    for key in ALIKE:
        if _plain(own[key]) != _plain(others[key]):
            raise ValueError(
                f"ControlNet {name} is not for this model: its {key} is {_plain(own[key])}, the "
                f"model's {_plain(others[key])}; give one that was trained for its family"
            )
    scale = 2 ** (len(own["conditioning_embedding_out_channels"]) - 1)
    if scale != vae_scale:
        raise ValueError(
            f"ControlNet {name} is not for this model: it has {scale} pixels a latent, the model "
            f"{vae_scale}"
        )


def check(paths: Sequence[Path], weights: Weights) -> list[str]:
    """The hashes of controls. Raises ValueError unless they fit a model that is not loaded.

    Of a single file that is known where its configurations are at hand; else when it is loaded.
    """
    found = [locate(str(path)) for path in paths]
    folder = weights.path if weights.single is None else weights.config_folder
    nets = [outline(files) for files in found]
    if folder is not None and nets:
        with torch.device("meta"):
            unet: Any = UNet2DConditionModel.from_config(weights.unet_config(folder))
        scale = facts.vae_scale(read_json(folder / "vae" / "config.json"))
        for files, net in zip(found, nets, strict=True):
            check_fit(files.name, net, unet, scale)
    return [files.sha256 for files in found]


def _plain(value: Any) -> Any:
    """A setting as it is compared: lists, tuples, and one number for several equal ones."""
    if isinstance(value, Mapping) or not isinstance(value, list | tuple):
        return value
    return value[0] if len(set(value)) == 1 else tuple(value)
