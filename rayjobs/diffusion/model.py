"""A loaded model: the parts of an SDXL-family or Stable Diffusion pipeline on one device.

Owns where weights may come from, what is refused, and a model's identity. Knows no storage beyond
local paths and the Hugging Face hub, and nothing of requests.
"""

import hashlib
import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
import transformers
from diffusers import (
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)

STARTER = Path(__file__).parents[1] / "starter" / "model"
FAMILIES = {
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusionXLImg2ImgPipeline": "sdxl",
    "StableDiffusionPipeline": "sd",
    "StableDiffusionImg2ImgPipeline": "sd",
}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PICKLES = {".bin", ".ckpt", ".pt", ".pth", ".pkl"}
IDENTITY = {".json", ".txt", ".safetensors", ".model"}
COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")

diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """How a model is held. Speed and memory, and the last bits, but not what it draws.

    `attention` names torch's scaled-dot-product kernel. `compile` is `blocks` (each repeated
    transformer block once: quick to start) or `full` (the whole UNet). The autoencoder stays in
    float32 where its config says that float16 overflows, unless `vae_dtype` says otherwise.
    """

    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    device: str = "auto"
    vae_dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    attention: Literal["auto", "math", "flash", "efficient", "cudnn"] = "auto"
    channels_last: bool = False
    compile: Literal["no", "blocks", "full"] = "no"
    vae_slicing: bool = False
    vae_tiling: bool = False


@dataclass(frozen=True, kw_only=True)
class Model:
    """A pipeline's parts, in evaluation mode on `device`. Shared by everything that uses them."""

    uri: str
    family: str
    unet: Any
    vae: Any
    text_encoders: list[Any]
    tokenizers: list[Any]
    scheduler: Any
    force_zeros: bool
    sha256: str
    dtype: torch.dtype
    device: str
    options: ModelOptions = field(default_factory=ModelOptions)

    @property
    def is_edm(self) -> bool:
        """Whether the UNet was trained with EDM preconditioning, as Playground v2.5 was."""
        return type(self.scheduler).__name__.startswith("EDM")

    @property
    def vae_scale(self) -> int:
        """Pixels per latent, along a side."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def default_side(self) -> int:
        return int(self.unet.config.sample_size) * self.vae_scale

    @property
    def default_guidance_scale(self) -> float:
        """What each family's makers recommend: Playground v2.5, SDXL and Stable Diffusion."""
        return 3.0 if self.is_edm else 5.0 if self.family == "sdxl" else 7.5

    @cached_property
    def latents_mean_std(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The autoencoder's own (1, C, 1, 1) mean and deviation; 0 and 1 where it names none."""
        mean = getattr(self.vae.config, "latents_mean", None)
        std = getattr(self.vae.config, "latents_std", None)
        if mean is None or std is None or self.family == "sd":
            mean, std = [0.0], [1.0]
        shape = (1, -1, 1, 1)
        as_tensor = {"device": self.device, "dtype": self.vae.dtype}
        return torch.tensor(mean, **as_tensor).view(shape), torch.tensor(std, **as_tensor).view(shape)


def load_model(uri: str, options: ModelOptions | None = None, *, config: str | None = None) -> Model:
    """Load `starter`, a local diffusers folder, a single `.safetensors` file, or a hub id.

    `config` is a local diffusers folder whose configs and tokenizers a single file is to use; without
    it diffusers takes those of the matching base model from the hub.

    Raises:
        ValueError: nothing is there, it cannot be read, it is a pickle, or it is another family.
    """
    options = options or ModelOptions()
    device = _choose_device(options.device)
    dtype = _choose_dtype(options.dtype, device)
    path = STARTER if uri == "starter" else Path(uri)
    try:
        if path.is_file():
            pipeline, sha256 = _load_file(path, dtype, config), _digest([(path.name, path)])
        else:
            folder = path if path.is_dir() else _download(uri)
            pipeline, sha256 = _load_folder(folder, dtype), _digest(_identity_files(folder))
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"cannot load model {uri!r}: {_first_line(error)}") from error
    return _assemble(uri, pipeline, sha256, dtype, device, options)


def _assemble(
    uri: str, pipeline: Any, sha256: str, dtype: torch.dtype, device: str, options: ModelOptions
) -> Model:
    vae_dtype = _vae_dtype(pipeline.vae, dtype, options.vae_dtype)
    pipeline.unet.to(device=device, dtype=dtype)
    pipeline.vae.to(device=device, dtype=vae_dtype)
    encoders = [pipeline.text_encoder, getattr(pipeline, "text_encoder_2", None)]
    tokenizers = [pipeline.tokenizer, getattr(pipeline, "tokenizer_2", None)]
    for module in [pipeline.unet, pipeline.vae, *filter(None, encoders)]:
        module.to(device).eval().requires_grad_(False)
    if options.vae_slicing:
        pipeline.vae.enable_slicing()
    if options.vae_tiling:
        pipeline.vae.enable_tiling()
    if options.channels_last:
        pipeline.unet.to(memory_format=torch.channels_last)
        pipeline.vae.to(memory_format=torch.channels_last)
    if options.compile == "full":
        pipeline.unet.compile()
    elif options.compile == "blocks":
        pipeline.unet.compile_repeated_blocks()
    return Model(
        uri=uri,
        family=FAMILIES[type(pipeline).__name__],
        unet=pipeline.unet,
        vae=pipeline.vae,
        text_encoders=[encoder for encoder in encoders if encoder is not None],
        tokenizers=[tokenizer for tokenizer in tokenizers if tokenizer is not None],
        scheduler=pipeline.scheduler,
        force_zeros=bool(getattr(pipeline.config, "force_zeros_for_empty_prompt", False)),
        sha256=sha256,
        dtype=dtype,
        device=device,
        options=options,
    )


def _load_folder(folder: Path, dtype: torch.dtype) -> Any:
    index_path = folder / "model_index.json"
    if not index_path.is_file():
        _refuse_pickles(folder)
        raise ValueError(f"{folder} is not a diffusers model: it has no model_index.json")
    index = json.loads(index_path.read_text())
    class_name = index.get("_class_name")
    if class_name not in FAMILIES:
        raise ValueError(f"{folder} is a {class_name}; supported are {', '.join(FAMILIES)}")
    if index.get("requires_aesthetics_score"):
        raise ValueError(f"{folder} is an SDXL refiner, which this engine does not run")
    _refuse_pickles(folder)
    extra: dict[str, Any] = {"safety_checker": None, "requires_safety_checker": False}
    if FAMILIES[class_name] == "sdxl":
        extra = {"add_watermarker": False}
    pipeline_class = getattr(diffusers, class_name)
    pipeline = pipeline_class.from_pretrained(
        folder, dtype=dtype, use_safetensors=True, variant=_only_variant(folder), **extra
    )
    if pipeline.unet.config.in_channels != 4:
        raise ValueError(
            f"{folder}: its UNet takes {pipeline.unet.config.in_channels} channels, not 4 "
            "(inpainting models are not supported)"
        )
    return pipeline


def _load_file(path: Path, dtype: torch.dtype, config: str | None) -> Any:
    if path.suffix in PICKLES:
        raise ValueError(_pickle_message(path))
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} is not a model: expected a .safetensors file or a folder")
    from safetensors import safe_open

    with safe_open(path, "pt") as tensors:
        sdxl = any(key.startswith("conditioner.") for key in tensors.keys())
    if sdxl:
        return StableDiffusionXLPipeline.from_single_file(
            str(path), config=config, dtype=dtype, add_watermarker=False
        )
    return StableDiffusionPipeline.from_single_file(
        str(path), config=config, dtype=dtype, safety_checker=None
    )


def _download(uri: str) -> Path:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", uri) or uri.startswith((".", "/")):
        raise ValueError(f"model {uri!r} is neither a folder, a .safetensors file nor a hub id")
    try:
        return Path(DiffusionPipeline.download(uri, use_safetensors=True))
    except Exception as error:
        raise ValueError(
            f"model {uri!r} is not a local path and cannot be fetched from the hub: "
            f"{_first_line(error)}"
        ) from error


def _refuse_pickles(folder: Path) -> None:
    for component in [folder / name for name in COMPONENTS] + [folder]:
        files = list(component.glob("*")) if component.is_dir() else []
        pickles = [file for file in files if file.suffix in PICKLES]
        if pickles and not any(file.suffix == ".safetensors" for file in files):
            raise ValueError(_pickle_message(pickles[0]))


def _pickle_message(path: Path) -> str:
    return (
        f"{path} is a pickle, which can run code when it is opened. Convert it once where you trust "
        "it: safetensors.torch.save_file(torch.load(path, weights_only=True), "
        f"'{path.with_suffix('.safetensors').name}')"
    )


def _only_variant(folder: Path) -> str | None:
    """The variant to ask for when the UNet's weights exist in just that one, such as fp16."""
    names = [path.name for path in (folder / "unet").glob("*.safetensors")]
    variants = {name.split(".")[1] for name in names if name.count(".") == 2 and "-of-" not in name}
    plain = any(name.count(".") == 1 for name in names)
    return variants.pop() if len(variants) == 1 and not plain else None


def _identity_files(folder: Path) -> list[tuple[str, Path]]:
    index = json.loads((folder / "model_index.json").read_text())
    parts = [name for name, value in index.items() if isinstance(value, list) and value[0]]
    files = [folder / "model_index.json"]
    for part in parts:
        files += [p for p in (folder / part).rglob("*") if p.is_file() and p.suffix in IDENTITY]
    return [(file.relative_to(folder).as_posix(), file) for file in files]


def _digest(files: list[tuple[str, Path]]) -> str:
    """SHA-256 over the sorted list of (relative path, SHA-256), as canonical JSON."""
    hashes = sorted([name, _sha256(path)] for name, path in files)
    return hashlib.sha256(json.dumps(hashes, separators=(",", ":")).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _choose_device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device is {name!r}, but this process sees no CUDA device")
    return name


def _choose_dtype(name: str, device: str) -> torch.dtype:
    if name == "auto":
        return torch.float32 if device == "cpu" else torch.bfloat16
    return DTYPES[name]


def _vae_dtype(vae: Any, dtype: torch.dtype, name: str) -> torch.dtype:
    if name != "auto":
        return DTYPES[name]
    return torch.float32 if dtype == torch.float16 and vae.config.force_upcast else dtype


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
