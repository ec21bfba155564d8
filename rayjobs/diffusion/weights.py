"""A model's files: where they may be, what is refused, and the identity they give the model.

Reads headers and configs only, so that a job can refuse a bad model before a worker starts. Knows
no storage beyond local paths and the Hugging Face hub, and imports no torch.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from rayjobs.diffusion import facts
from rayjobs.diffusion.facts import FAMILIES

STARTER = Path(__file__).parents[1] / "starter" / "model"
PICKLES = {".bin", ".ckpt", ".pt", ".pth", ".pkl"}
IDENTITY = {".json", ".txt", ".safetensors", ".model"}
LORA_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
WEIGHTED = ("unet", "vae", "text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class Weights:
    """The files of one model: a diffusers folder or a single safetensors file."""

    path: Path
    class_name: str

    @property
    def family(self) -> str:
        return FAMILIES[self.class_name]

    @property
    def variant(self) -> str | None:
        """The variant to ask for when the UNet's weights exist in just that one, such as fp16."""
        names = [path.name for path in (self.path / "unet").glob("*.safetensors")]
        stems = [re.sub(r"-\d+-of-\d+", "", name) for name in names]
        variants = {stem.split(".")[1] for stem in stems if stem.count(".") == 2}
        plain = any(stem.count(".") == 1 for stem in stems)
        return variants.pop() if len(variants) == 1 and not plain else None

    @cached_property
    def scheduler_name(self) -> str:
        """The class of the model's own sampler."""
        if self.path.is_file():
            return "EulerDiscreteScheduler" if self.family == "sdxl" else "PNDMScheduler"
        name = read_json(self.path / "scheduler" / "scheduler_config.json").get("_class_name")
        if not isinstance(name, str):
            raise ValueError(f"{self.path}/scheduler: scheduler_config.json names no class")
        return name

    @property
    def is_edm(self) -> bool:
        return facts.is_edm(self.scheduler_name)

    @cached_property
    def default_side(self) -> int:
        """Pixels along a side of the pictures that the model was trained on."""
        if self.path.is_file():
            return 1024 if self.family == "sdxl" else 512
        unet, vae = (read_json(self.path / name / "config.json") for name in ("unet", "vae"))
        return facts.default_side(unet, vae)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 over the sorted list of (relative path, SHA-256) of every weight and config."""
        if self.path.is_file():
            files = [(self.path.name, self.path)]
        else:
            index = read_json(self.path / "model_index.json")
            parts = [name for name, kind in index.items() if isinstance(kind, list) and kind[0]]
            paths = [path for part in parts for path in (self.path / part).rglob("*")]
            paths = [path for path in paths if path.is_file() and path.suffix in IDENTITY]
            paths.append(self.path / "model_index.json")
            files = [(path.relative_to(self.path).as_posix(), path) for path in paths]
        hashes = sorted([name, sha256_of(file)] for name, file in files)
        return hashlib.sha256(json.dumps(hashes, separators=(",", ":")).encode()).hexdigest()


def locate(uri: str) -> Weights:
    """Find the files that `uri` means: `starter`, a local folder or file, or a hub id.

    Raises ValueError: nothing is there, it is a pickle, it is damaged, or it is another family.
    """
    path = STARTER if uri == "starter" else Path(uri)
    if path.is_file():
        return _single_file(path)
    folder = path if path.is_dir() else _download(uri)
    if not (folder / "model_index.json").is_file():
        refuse_pickles([folder])
        raise ValueError(f"model {uri!r} is not a diffusers folder: it has no model_index.json")
    index = read_json(folder / "model_index.json")
    class_name = str(index.get("_class_name"))
    if class_name not in FAMILIES:
        raise ValueError(f"model {uri!r} is a {class_name}; supported are {', '.join(FAMILIES)}")
    if index.get("requires_aesthetics_score"):
        raise ValueError(f"model {uri!r} is an SDXL refiner, which this engine does not run")
    parts = [folder / name for name in WEIGHTED if (index.get(name) or [None])[0]]
    refuse_pickles(parts)
    for part in parts:
        _check_part(part)
    return Weights(folder, class_name)


def refuse_pickles(folders: list[Path]) -> None:
    """Raise ValueError for a folder whose weights exist as pickles only."""
    for folder in folders:
        files = list(folder.glob("*"))
        pickles = [file for file in files if file.suffix in PICKLES]
        if pickles and not any(file.suffix == ".safetensors" for file in files):
            raise ValueError(_pickle_message(pickles[0]))


def first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


def _single_file(path: Path) -> Weights:
    if path.suffix in PICKLES:
        raise ValueError(_pickle_message(path))
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} is not a model: expected a .safetensors file or a folder")
    sdxl = any(key.startswith("conditioner.") for key in _tensor_names(path))
    return Weights(path, "StableDiffusionXLPipeline" if sdxl else "StableDiffusionPipeline")


def _check_part(folder: Path) -> None:
    """Raise ValueError unless a part has its config and undamaged weights."""
    read_json(folder / "config.json")
    files = list(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no .safetensors weights")
    for file in files:
        _tensor_names(file)


def _tensor_names(path: Path) -> list[str]:
    """Names in a safetensors file, from its header, which also tells whether the file is whole."""
    try:
        with safe_open(path, "np") as tensors:
            return list(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {first_line(error)}") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError where it is missing or is none."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {first_line(error)}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object")
    return value


def _download(uri: str) -> Path:
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", uri):
        raise ValueError(
            f"model {uri!r} does not exist; give `starter`, a diffusers folder, a .safetensors "
            "file or a hub id"
        )
    from diffusers import DiffusionPipeline

    try:
        return Path(DiffusionPipeline.download(uri, use_safetensors=True))
    except Exception as error:
        raise ValueError(
            f"model {uri!r} is no local path and cannot be had from the hub: {first_line(error)}"
        ) from error


def _pickle_message(path: Path) -> str:
    return (
        f"{path} is a pickle, which can run code when it is opened. Convert it once where you "
        "trust it: safetensors.torch.save_file(torch.load(path, weights_only=True), "
        f"'{path.with_suffix('.safetensors').name}')"
    )


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lora_file(path: Path) -> Path:
    """The adapter's file: `path`, or the one in it: diffusers', peft's, or the only one.

    Raises ValueError where there is none.
    """
    if path.is_dir():
        named = [path / name for name in LORA_FILES if (path / name).is_file()]
        found = named[:1] or sorted(path.glob("*.safetensors"))
        if len(found) > 1:
            names = ", ".join(file.name for file in found)
            raise ValueError(f"LoRA {path} is a folder of {names}; name the file")
        path = found[0] if found else path / LORA_FILES[0]
    if not path.is_file():
        raise ValueError(f"LoRA {path} does not exist")
    if path.suffix != ".safetensors":
        raise ValueError(f"LoRA {path} is not a .safetensors file; pickles are refused")
    return path


def word_file(path: Path) -> Path:
    """The file of learned embeddings: `path` or the one in it. Raises ValueError for no such."""
    path = path / "learned_embeds.safetensors" if path.is_dir() else path
    if path.suffix in PICKLES and path.is_file():
        raise ValueError(
            f"learned words {path} are a pickle, which can run code when it is opened. Convert it "
            f"once where you trust it: held = torch.load({str(path)!r}, weights_only=True); "
            "safetensors.torch.save_file({'emb_params': held['string_to_param']['*'].detach()}, "
            f"{path.with_suffix('.safetensors').name!r})"
        )
    if path.suffix != ".safetensors" or not path.is_file():
        raise ValueError(f"learned words {path}: no such .safetensors file")
    return path
