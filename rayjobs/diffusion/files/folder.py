"""A diffusers folder compared with itself: its index, its parts' configurations, their tensors.

Owns which files diffusers would read and what would be wrong with them. Loads no weights. Knows
nothing of single files.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rayjobs.diffusion.facts import INPAINTING, LATENTS
from rayjobs.diffusion.files import foreign, layout
from rayjobs.diffusion.files.header import read_header

PICKLES = {".bin", ".ckpt", ".pt", ".pth", ".pkl"}
PARTS = {
    "sdxl": ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
    "sd": ("unet", "vae", "text_encoder", "tokenizer"),
    "refiner": ("unet", "vae", "text_encoder_2", "tokenizer_2"),
}
LAYOUTS = {"UNet2DConditionModel": layout.unet, "AutoencoderKL": layout.vae}
STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
OLD_NAMES = (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"))
"""Of an autoencoder's attention, in files that diffusers wrote before 0.18."""
SIZE_NUMBERS = {"sdxl": 6, "refiner": 5}
"""What SDXL's UNet is told beside texts: size, place and size again; a refiner's size, place and an
aesthetic score."""
MOST_NAMED = 3


def check_folder(folder: Path, kind: str, index: Mapping[str, Any]) -> dict[str, str | None]:
    """The variant to load of each part that has weights, such as fp16; None is the plain one.

    `kind` is one of PARTS, `index` model_index.json. Raises ValueError for a part that is missing,
    a file that is damaged, tensors that do not fit the part's configuration, and parts that do not
    fit each other.
    """
    for name in PARTS[kind]:
        for file in (folder / name).glob("*.safetensors"):
            read_header(file)
    _check_index(folder, kind, index)
    configs = {}
    for name in PARTS[kind]:
        if name.startswith("tokenizer"):
            check_tokenizer(folder / name)
        else:
            configs[name] = read_json(folder / name / "config.json")
    check_unet(folder, configs["unet"])
    _check_fit(folder, kind, configs)
    return {
        name: _check_weights(folder / name, config, str(index[name][1]))
        for name, config in configs.items()
    }


def check_unet(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise ValueError for a UNet of another kind of model."""
    channels = config.get("in_channels", LATENTS)
    if channels not in (LATENTS, INPAINTING):
        raise ValueError(
            f"model {str(folder)!r}: its UNet takes {channels} channels, not {LATENTS}, or "
            f"{INPAINTING} as inpainting models do (editing models are not supported)"
        )
    if config.get("encoder_hid_dim_type") is not None:
        raise ValueError(f"model {str(folder)!r}: its UNet reads the texts of another encoder")
    other = [key for key in ("class_embed_type", "num_class_embeds") if config.get(key) is not None]
    if other or config.get("addition_embed_type") not in (None, "text_time"):
        key = other[0] if other else "addition_embed_type"
        raise ValueError(
            f"model {str(folder)!r}: its UNet has {key} {config[key]!r}, an input that upscaling "
            "and image-guided models have and this engine does not give"
        )


def refuse_pickles(folders: list[Path]) -> None:
    """Raise ValueError for a folder whose weights exist as pickles only."""
    for folder in folders:
        files = list(folder.glob("*"))
        pickles = [file for file in files if file.suffix in PICKLES]
        if pickles and not any(file.suffix == ".safetensors" for file in files):
            raise ValueError(pickle_message(pickles[0]))


def pickle_message(path: Path) -> str:
    return (
        f"{path} is a pickle, which can run code when it is opened. Convert it once where you "
        "trust it: safetensors.torch.save_file(torch.load(path, weights_only=True), "
        f"'{path.with_suffix('.safetensors').name}')"
    )


def read_json(path: Path) -> dict[str, Any]:
    """Raises ValueError when it is missing or is no JSON object."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object")
    return value


def _check_index(folder: Path, kind: str, index: Mapping[str, Any]) -> None:
    for name in PARTS[kind]:
        said = index.get(name)
        if not (isinstance(said, list) and len(said) == 2 and all(said)):
            raise ValueError(
                f"model {str(folder)!r} has no {name}: model_index.json says {said!r}; give a "
                "folder with all parts"
            )


def check_tokenizer(folder: Path) -> None:
    """Raise ValueError unless it has the files of one."""
    has_pairs = (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    if not has_pairs and not (folder / "tokenizer.json").is_file():
        raise ValueError(f"{folder} is missing, or has neither vocab.json with merges.txt nor "
                         "tokenizer.json")  # fmt: skip


def _check_weights(folder: Path, config: Mapping[str, Any], kind: str) -> str | None:
    """The variant of a part that is to be loaded. Raises ValueError for what is wrong with it."""
    headers = {file: read_header(file) for file in sorted(folder.glob("*.safetensors"))}
    if not headers:
        raise ValueError(f"{folder} holds no .safetensors weights")
    stem = STEMS.get(folder.name, "model")
    variant = _variant(folder, stem)
    files = _files(folder, stem, variant)
    absent = [file.name for file in files if file not in headers]
    if absent:
        raise ValueError(f"{folder} lacks {_some(absent)}, which its index names")
    chosen = [headers[file] for file in files]
    for header in chosen:
        quantized = foreign.quantization(header)
        if quantized is not None:
            raise ValueError(f"{header.path} holds weights that are {quantized}")
    tensors = {name: it.shape for header in chosen for name, it in header.tensors.items()}
    _check_tensors(folder, config, kind, tensors)
    return variant


def _variant(folder: Path, stem: str) -> str | None:
    """The one variant in which a part exists, unless it exists without any."""
    names = [re.sub(r"-\d+-of-\d+", "", file.name) for file in folder.glob("*.safetensors")]
    if f"{stem}.safetensors" in names:
        return None
    pattern = re.compile(rf"{re.escape(stem)}\.([^.]+)\.safetensors")
    variants = sorted({found[1] for found in map(pattern.fullmatch, names) if found})
    if len(variants) > 1:
        raise ValueError(f"{folder} exists in the variants {', '.join(variants)}; keep one of them")
    if not variants:
        raise ValueError(f"{folder} has no {stem}.safetensors; it has {_some(sorted(names))}")
    return variants[0]


def _files(folder: Path, stem: str, variant: str | None) -> list[Path]:
    """The files that are read of a part; of a sharded one, those that its index names."""
    suffix = "" if variant is None else f".{variant}"
    whole = folder / f"{stem}{suffix}.safetensors"
    index = folder / f"{stem}.safetensors.index{suffix}.json"
    # transformers reads the whole file where there is one, diffusers the shards.
    if whole.is_file() and not (index.is_file() and stem in STEMS.values()):
        return [whole]
    if not index.is_file():
        raise ValueError(f"{index} is missing, which says what the shards beside it hold")
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{index} names no tensors")
    files = {folder / str(name): read_names(folder / str(name)) for name in set(places.values())}
    lost = [name for name, file in places.items() if name not in files[folder / file]]
    if lost:
        raise ValueError(f"{index} names tensors that the shards do not have: {_some(lost)}")
    return sorted(files)


def read_names(path: Path) -> frozenset[str]:
    """Raises ValueError when the file is missing or damaged."""
    if not path.is_file():
        raise ValueError(f"{path} is missing, which the index beside it names")
    return read_header(path).names


def _check_tensors(
    folder: Path, config: Mapping[str, Any], kind: str, tensors: Mapping[str, layout.Shape]
) -> None:
    """Raise ValueError unless the tensors are those that the configuration asks for."""
    optional = {"embeddings.position_ids", "text_projection.weight"}
    if kind in LAYOUTS:
        wanted = LAYOUTS[kind](config)
    elif kind.startswith("CLIPTextModel"):
        wanted = layout.text_encoder(config)
        if not kind.endswith("WithProjection"):
            del wanted["text_projection.weight"]
        tensors = {name.removeprefix("text_model."): shape for name, shape in tensors.items()}
    else:
        return
    if wanted is None:
        return
    if kind == "AutoencoderKL":
        tensors = {_modern(name): shape for name, shape in tensors.items()}
    names = tensors.keys()
    missing = sorted(wanted.keys() - names)
    if missing:
        what = foreign.name_of(names)
        raise ValueError(
            f"{folder} lacks {len(missing)} of the {len(wanted)} tensors that its config.json asks "
            f"for: {_some(missing)}" + (f"; it is {what}" if what else "")
        )
    extra = sorted(names - wanted.keys() - optional)
    if extra:
        raise ValueError(
            f"{folder} has {len(extra)} tensors that its config.json has no place for: "
            f"{_some(extra)}"
        )
    other = [name for name, shape in wanted.items() if tensors[name] != shape]
    if other:
        raise ValueError(
            f"{folder} has {len(other)} tensors of another shape than its config.json asks for: "
            f"{other[0]} is {tensors[other[0]]}, not {wanted[other[0]]}"
        )


def _modern(name: str) -> str:
    for old, new in OLD_NAMES:
        name = re.sub(rf"(attentions\.\d+)\.{old}\.", rf"\1.{new}.", name)
    return name


def _check_fit(folder: Path, kind: str, configs: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise ValueError when parts do not fit: of another model, say."""
    unet = configs["unet"]
    encoders = [config for name, config in configs.items() if name.startswith("text_encoder")]
    width = sum(int(config.get("hidden_size", 0)) for config in encoders)
    reads = unet.get("cross_attention_dim", 1280)
    if isinstance(reads, int) and width and reads != width:
        raise ValueError(
            f"model {str(folder)!r}: its text encoders give {width} numbers a token, its UNet "
            f"reads {reads}; parts of two models are mixed"
        )
    _check_sizes(folder, SIZE_NUMBERS.get(kind), unet, configs.get("text_encoder_2", {}))
    channels = configs["vae"].get("latent_channels", LATENTS)
    if channels != unet.get("out_channels", LATENTS):
        raise ValueError(
            f"model {str(folder)!r}: its autoencoder has {channels} channels, its UNet "
            f"{unet.get('out_channels', LATENTS)}; parts of two models are mixed"
        )


def _check_sizes(
    folder: Path, numbers: int | None, unet: Mapping[str, Any], encoder: Mapping[str, Any]
) -> None:
    """Raise ValueError for a UNet that reads other numbers beside texts than SDXL's does."""
    reads = unet.get("projection_class_embeddings_input_dim")
    width, pooled = unet.get("addition_time_embed_dim"), encoder.get("projection_dim")
    if not (isinstance(reads, int) and isinstance(width, int) and isinstance(pooled, int)):
        return
    given = reads if numbers is None else pooled + numbers * width
    if given != reads:
        raise ValueError(
            f"model {str(folder)!r}: its UNet reads {reads} numbers of text and size, of which it "
            f"gets {given}; it is of another model: a refiner's takes 5 numbers, a base's 6"
        )


def _some(names: list[str]) -> str:
    more = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
