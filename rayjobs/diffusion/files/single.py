"""A whole model, or its UNet, in one safetensors file: what it is and what it predicts.

Owns the marks that tools leave in such files (tensors without weights, metadata) and their meaning.
Reads the header and a few numbers. Knows nothing of how weights become modules.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rayjobs.diffusion.facts import INPAINTING, LATENTS
from rayjobs.diffusion.files import foreign, layout
from rayjobs.diffusion.files.header import Header

LDM = "model.diffusion_model."
SD_ENCODER = "cond_stage_model.transformer."
FIRST_ENCODER, SECOND_ENCODER = "conditioner.embedders.0.", "conditioner.embedders.1."
REFINER_ENCODER = f"{FIRST_ENCODER}model."
"""A refiner's one text encoder is the larger one, in the first place."""
CHANNELS = {5: "a depth", 7: "an upscaling", 8: "an editing (pix2pix)"}

V_KEYS = {"v_pred", "vpred", "v_prediction", "v_parameterization"}
ZERO_SNR_KEYS = {"ztsnr", "zsnr", "zero_snr", "zero_terminal_snr"}
"""Tensors that only mark what was trained, by the names that tools give them."""
PREDICTION_METADATA = (
    "modelspec.prediction_type",
    "modelspec.predict_key",
    "ss_prediction_type",
    "prediction_type",
)
PREDICTION_WORDS = {
    **dict.fromkeys(("v", "v_pred", "vpred", "velocity"), "v_prediction"),
    **dict.fromkeys(("eps", "noise"), "epsilon"),
    **dict.fromkeys(("x0", "x", "original_sample"), "sample"),
}
"""What tools call it, by diffusers' words."""
V_METADATA = ("ss_v_parameterization", "v_parameterization", "ss_v_pred", "v_pred")
ZERO_SNR_METADATA = ("ss_zero_terminal_snr", "zero_terminal_snr", "ztsnr", "modelspec.ztsnr")
TITLES = ("modelspec.title", "modelspec.tags", "modelspec.merged_from", "ss_output_name")

# Of the 2.x files, those that predict v have wider biases here (ComfyUI tells them apart by it).
V_BIAS = "output_blocks.11.1.transformer_blocks.0.norm1.bias"
V_BIAS_STD = 0.09
BASE_512_STEPS = 875_000
"""Training steps of Stable Diffusion 2.0's file of 512 pixels, which predicts noise."""

Version = Literal["sd1", "sd2", "sdxl", "refiner", "ssd-1b", "vega", "playground"]
# Transformer layers of the deepest attention, by which the distilled SDXLs are known.
DEPTHS: Mapping[int, Version] = {4: "ssd-1b", 2: "vega"}


@dataclass(frozen=True)
class Single:
    """What a file says of itself. `scheduler` are the keys of a diffusers scheduler's configuration
    that it decides, `_class_name` among them where it needs one."""

    header: Header
    version: Version
    prefix: str | None
    """Of the UNet's tensors in the original layout; None in that of diffusers."""
    parts: frozenset[str]
    """Of unet, vae, text_encoder, text_encoder_2, those that it holds."""
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    guess: str = "epsilon"
    """The prediction type where neither the file nor a configuration names one."""
    latents: Mapping[str, Any] = field(default_factory=dict)
    """What the file decides of the autoencoder's configuration."""

    @property
    def family(self) -> str:
        return "sd" if self.version in ("sd1", "sd2") else "sdxl"

    @property
    def channels(self) -> int:
        """That the UNet takes."""
        return _channels(self.header, self.prefix)

    @property
    def has_bare_encoder(self) -> bool:
        """Whether its text encoder has the names of before transformers' `text_model`."""
        return f"{SD_ENCODER}embeddings.position_embedding.weight" in self.header.names

    @property
    def titles(self) -> str:
        """What its metadata calls it."""
        return " ".join(str(self.header.metadata.get(key, "")) for key in TITLES)

    @property
    def missing(self) -> list[str]:
        """Parts of its family that it lacks."""
        names = ["unet", "vae", "text_encoder", "text_encoder_2"]
        wanted = names if self.family == "sdxl" else names[:3]
        wanted = ["unet", "vae", "text_encoder_2"] if self.version == "refiner" else wanted
        return [name for name in wanted if name not in self.parts]

    def check_config(self, unet: Mapping[str, Any], vae: Mapping[str, Any], source: str) -> None:
        """Raise ValueError unless the file's tensors are those that these configurations ask for.

        The layouts have other names for the same tensors, so that their number and their shapes
        tell; a projection is a layer of the one and a convolution of a pixel of the other.
        """
        width, reads = _width(self.header), unet.get("cross_attention_dim", 1280)
        if width and isinstance(reads, int) and width != reads:
            raise ValueError(
                f"{self.header.path}: its UNet reads texts of {width} numbers a token, that of "
                f"{source} {reads}; give the configuration of a model of its kind"
            )
        found = {"UNet": (UNET, self.prefix or "", layout.unet(unet))}
        if "vae" in self.parts:
            found["autoencoder"] = (VAE, "", layout.vae(vae))
        for part, (pattern, prefix, wanted) in found.items():
            mine = re.compile(re.escape(prefix) + pattern)
            found_here = [t.shape for name, t in self.header.tensors.items() if mine.match(name)]
            if wanted is None:
                continue
            way_out = "it is damaged, or give model.config a folder of its own kind"
            if len(found_here) != len(wanted):
                raise ValueError(
                    f"{self.header.path}: its {part} has {len(found_here)} tensors, that of "
                    f"{source} {len(wanted)}; {way_out}"
                )
            others = Counter(map(_core, found_here)) - Counter(map(_core, wanted.values()))
            if others:
                raise ValueError(
                    f"{self.header.path}: its {part} has {others.total()} tensors of another shape "
                    f"than that of {source}, such as {next(iter(others))}; {way_out}"
                )


def _core(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without a kernel of one pixel."""
    return shape[:2] if shape[2:] == (1, 1) else shape


UNET = (
    r"(input_blocks|middle_block|output_blocks|time_embed|label_emb|out|conv_in|conv_out|"
    r"conv_norm_out|down_blocks|mid_block|up_blocks|time_embedding|add_embedding)\."
)
VAE = r"(first_stage_model|vae)\.((encoder|decoder)\.|(post_)?quant_conv\.)"


def read_single(header: Header) -> Single:
    """Raises ValueError, naming what the file is, unless it holds a UNet of the families."""
    path, names = header.path, header.names
    what = foreign.name_of(names)
    if what is not None:
        raise ValueError(f"{path} is {what}, not a Stable Diffusion or SDXL model")
    prefix = _prefix(names)
    if prefix is None and "down_blocks.0.resnets.0.conv1.weight" not in names:
        part = foreign.part_of(names)
        raise ValueError(
            f"{path} is {part}, without a UNet"
            if part
            else f"{path} holds no UNet of Stable Diffusion or SDXL that is known"
        )
    quantized = foreign.quantization(header)
    if quantized is not None:
        raise ValueError(
            f"{path} holds weights that are {quantized}; give the file in float16, bfloat16 or "
            "plain float8"
        )
    parts = _parts(names)
    _check_unet(header, prefix, parts)
    version = _version(header, prefix, parts)
    return Single(
        header,
        version,
        prefix,
        parts,
        _scheduler(header, version),
        _guess(header, version, prefix),
        _latents(header),
    )


def _prefix(names: frozenset[str]) -> str | None:
    """Of the UNet's tensors in the original layout."""
    for prefix in (LDM, "diffusion_model.", ""):
        if f"{prefix}input_blocks.0.0.weight" in names:
            return prefix
    return None


def _parts(names: frozenset[str]) -> frozenset[str]:
    beginnings = {name[:40] for name in names}

    def has(*prefixes: str) -> bool:
        return any(name.startswith(prefixes) for name in beginnings)

    found = {"unet"}
    if has("first_stage_model.decoder.", "vae.decoder."):
        found.add("vae")
    if has(REFINER_ENCODER):
        found.add("text_encoder_2")
    elif has("cond_stage_model.", FIRST_ENCODER):
        found.add("text_encoder")
    if has(SECOND_ENCODER):
        found.add("text_encoder_2")
    return frozenset(found)


def _check_unet(header: Header, prefix: str | None, parts: frozenset[str]) -> None:
    last = "conv_out.weight" if prefix is None else f"{prefix}out.2.weight"
    channels = _channels(header, prefix)
    if channels not in (LATENTS, INPAINTING):
        kind = CHANNELS.get(channels, "another kind of")
        raise ValueError(
            f"{header.path} is {kind} model: its UNet takes {channels} channels, not the {LATENTS} "
            f"or (inpainting) {INPAINTING} that this engine gives it"
        )
    given = (header.shape(last) or (LATENTS,))[0]
    if given != LATENTS:
        raise ValueError(f"{header.path}: its UNet gives {given} channels, not {LATENTS}")
    if parts == {"unet"} and _width(header) == 1280:
        raise ValueError(
            f"{header.path} is an SDXL refiner's UNet alone; give the whole refiner, as the model "
            "of one of passes"
        )


def _channels(header: Header, prefix: str | None) -> int:
    """That the UNet takes."""
    first = "conv_in.weight" if prefix is None else f"{prefix}input_blocks.0.0.weight"
    return (header.shape(first) or (0, 0))[1]


def _version(header: Header, prefix: str | None, parts: frozenset[str]) -> Version:
    names = header.names
    if any(name.startswith(REFINER_ENCODER) for name in names):
        return "refiner"
    if "edm_mean" in names and "edm_std" in names:
        return "playground"
    xl = "add_embedding.linear_1.weight" if prefix is None else f"{prefix}label_emb.0.0.weight"
    if xl in names or "text_encoder_2" in parts:
        return DEPTHS.get(_depth(names), "sdxl")
    if any(name.startswith("cond_stage_model.model.") for name in names) or _width(header) == 1024:
        return "sd2"
    return "sd1"


def _width(header: Header) -> int:
    """Of the texts' features that the UNet reads."""
    keys = (name for name in header.names if name.endswith("attn2.to_k.weight"))
    name = next(keys, None)
    return 0 if name is None else header.tensors[name].shape[1]


def _depth(names: frozenset[str]) -> int:
    """Layers of the UNet's deepest transformer on the way down."""
    layer = re.compile(r"(?:^|\.)(?:input|down)_blocks\..*\.transformer_blocks\.(\d+)\.")
    depths = (layer.search(name) for name in names)
    return max((int(found[1]) + 1 for found in depths if found), default=0)


def _scheduler(header: Header, version: Version) -> dict[str, Any]:
    names = header.names
    if version == "playground":
        return {
            "_class_name": "EDMDPMSolverMultistepScheduler",
            "prediction_type": "epsilon",
            "sigma_data": 0.5,
            "sigma_min": 0.002,
            "sigma_max": 80.0,
        }
    if "edm_vpred.sigma_max" in names:
        low, high = (header.read(f"edm_vpred.sigma_{end}") for end in ("min", "max"))
        return {
            "_class_name": "EDMEulerScheduler",
            "prediction_type": "v_prediction",
            "sigma_data": 1.0,
            "sigma_min": 0.002 if low is None else float(f"{low.item():.6g}"),
            "sigma_max": 120.0 if high is None else float(f"{high.item():.6g}"),
            "sigma_schedule": "exponential",
        }
    decided: dict[str, Any] = {}
    kind = _prediction(header)
    if kind is not None:
        decided["prediction_type"] = kind
    if ZERO_SNR_KEYS & names or _says(header.metadata, ZERO_SNR_METADATA):
        decided["rescale_betas_zero_snr"] = True
    return decided


def _prediction(header: Header) -> str | None:
    """What the file says that the UNet predicts; a mark among the tensors counts before metadata,
    where trainers and mergers often leave what they began with."""
    return "v_prediction" if V_KEYS & header.names else told_prediction(header.metadata)


def told_prediction(metadata: Mapping[str, str]) -> str | None:
    """What the metadata of a model, or of an adapter for it, says that the UNet predicts."""
    if _says(metadata, V_METADATA):
        return "v_prediction"
    for key in PREDICTION_METADATA:
        said = re.sub(r"[\s-]+", "_", str(metadata.get(key, "")).strip().lower())
        if said not in ("", "none"):
            return PREDICTION_WORDS.get(said, said)
    architecture = str(metadata.get("modelspec.architecture", ""))
    model = str(metadata.get("ss_base_model_version", ""))
    if "v2-768-v" in architecture or "v2_768_v" in model:
        return "v_prediction"
    return "epsilon" if "v2-512" in architecture or "v2_512" in model else None


def _says(metadata: Mapping[str, str], keys: tuple[str, ...]) -> bool:
    return any(str(metadata.get(key)).lower() in ("true", "1", "yes") for key in keys)


def _guess(header: Header, version: Version, prefix: str | None) -> str:
    """Of 2.x files, which seldom say it, those of 768 pixels predict v and those of 512 noise."""
    if version != "sd2":
        return "epsilon"
    steps = header.tensors.get("global_step")
    if steps is not None and _whole(header, "global_step") == BASE_512_STEPS:
        return "epsilon"
    bias = None if prefix is None else header.read(prefix + V_BIAS)
    if bias is None:
        return "v_prediction"
    return "v_prediction" if float(bias.std()) > V_BIAS_STD else "epsilon"


def _whole(header: Header, name: str) -> int:
    tensor = header.tensors[name]
    with header.path.open("rb") as file:
        file.seek(header.start + tensor.span[0])
        return int.from_bytes(file.read(tensor.span[1] - tensor.span[0]), "little", signed=True)


def _latents(header: Header) -> dict[str, Any]:
    """Playground v2.5's file has the mean and deviation of its latents among its tensors."""
    mean, std = header.read("edm_mean"), header.read("edm_std")
    if mean is None or std is None:
        return {}
    return {
        "latents_mean": [float(f"{value:.6g}") for value in mean.flatten()],
        "latents_std": [float(f"{value:.6g}") for value in std.flatten()],
        "scaling_factor": 0.5,
    }
