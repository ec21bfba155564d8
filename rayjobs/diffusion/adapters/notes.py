"""What stands beside an adapter's tensors: strengths, and the model that it was made for.

Owns the metadata of diffusers and kohya in a file's header, and peft's adapter_config.json beside
it. Knows no tensors.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayjobs.diffusion.files.identity import sha256_of
from rayjobs.diffusion.files.single import told_prediction

DIFFUSERS = "lora_adapter_metadata"
PEFT_CONFIG = "adapter_config.json"
READ_TYPES = ("LORA", "LOHA", "LOKR")
"""peft's kinds of adapters whose tensors mean what the reader takes them for."""
CHANGED_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values of `init_lora_weights` that changed the model's own weights as well."""
VARIANTS = (
    *("alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication"),
    *("monteclora_config", "target_parameters", "trainable_token_indices"),
    *("use_bdlora", "use_qalora", "velora_config"),
)
"""Settings by which the same tensors of a LoRA mean something else."""


@dataclass(frozen=True)
class Notes:
    """`parts` holds peft's settings by part; "" stands for a file of one part."""

    family: str | None
    """Of the model that it was trained for, where the file says so."""
    parts: Mapping[str, Mapping[str, Any]]
    title: str = ""
    prediction: str | None = None
    """What the model predicts that it was trained for, as diffusers spells it."""

    def strength(self, part: str, name: str, rank: int | None, alpha: float | None) -> float:
        """alpha / rank, or alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732): alpha from the layer's
        own tensor, else by peft's rules; 1 where nothing says it. `rank` None asks the settings.
        """
        settings = self._of(part)
        names = (name, f"{part}.{name}", f"{part}.text_model.{name}")
        size: float | None = rank
        if size is None:
            size = _of_layer(names, settings.get("rank_pattern"), settings.get("r"))
        if alpha is None:
            default = settings.get("lora_alpha", settings.get("alpha"))
            alpha = _of_layer(names, settings.get("alpha_pattern"), default)
        if alpha is None or size is None:
            return 1.0
        return alpha / (size**0.5 if settings.get("use_rslora") else size)

    @property
    def tells_strength(self) -> bool:
        return bool(self.parts)

    def needs_magnitude(self, part: str) -> bool:
        """Whether its settings say that it is a DoRA."""
        return bool(self._of(part).get("use_dora"))

    def _of(self, part: str) -> Mapping[str, Any]:
        return self.parts.get(part, self.parts.get("", {}))


def read(file: Path, header: Mapping[str, str]) -> Notes:
    """The notes of an adapter file with this `header` of metadata.

    Raises ValueError for notes that cannot be read.
    """
    config = peft_config(file)
    if config is not None:
        parts = {"": _object(PEFT_CONFIG, config.read_text())}
    elif DIFFUSERS in header:
        parts = _by_part(_object(DIFFUSERS, header[DIFFUSERS]))
    else:
        parts = {}
    for settings in parts.values():
        _check(settings)
    return Notes(_family(header), parts, title_of(header), told_prediction(header))


def title_of(header: Mapping[str, str]) -> str:
    """What an adapter is called by who made it; empty where that is not told."""
    return header.get("modelspec.title") or header.get("ss_output_name") or ""


def file_sha256(file: Path) -> str:
    """SHA-256 of an adapter file, and of peft's settings beside it, which it depends on."""
    config = peft_config(file)
    if config is None:
        return sha256_of(file)
    return hashlib.sha256(f"{sha256_of(file)} {sha256_of(config)}".encode()).hexdigest()


def peft_config(file: Path) -> Path | None:
    """The settings that peft saves beside `file`, without which its strength is unknown."""
    config = file.parent / PEFT_CONFIG
    return config if file.name.startswith("adapter_model") and config.is_file() else None


def _object(name: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"its {name} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"its {name} is no JSON object")
    return value


def _check(settings: Mapping[str, Any]) -> None:
    """Raise ValueError for settings of peft under which the tensors are not what they look like."""
    kind = settings.get("peft_type") or READ_TYPES[0]
    if kind not in READ_TYPES:
        raise ValueError(f"peft_type {kind} is not read; merge it into the model with peft")
    start = str(settings.get("init_lora_weights"))
    if start.lower().startswith(CHANGED_STARTS):
        raise ValueError(
            f"was begun with init_lora_weights={start!r}, which changed the model's own weights; "
            "save it with peft's path_initial_model_for_weight_conversion, or merge it"
        )
    for name in VARIANTS:
        if settings.get(name):
            raise ValueError(f"peft's {name} is not read; merge it into the model with peft")


def _by_part(settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    parts: dict[str, dict[str, Any]] = {}
    for key, value in settings.items():
        part, _, name = key.partition(".")
        parts.setdefault(part, {})[name] = value
    return parts


def _family(header: Mapping[str, str]) -> str | None:
    """sdxl or sd, by what kohya and the model specification call the base model."""
    told = [header.get("modelspec.architecture", ""), header.get("ss_base_model_version", "")]
    for name in told:
        if name.startswith(("stable-diffusion-xl", "sdxl")):
            return "sdxl"
        if name.startswith(("stable-diffusion-v", "sd_v")):
            return "sd"
    return None


def _of_layer(
    names: tuple[str, ...], patterns: Mapping[str, Any] | None, default: Any
) -> float | None:
    """The value of the first pattern that a name of the layer ends with, as peft has it."""
    for pattern, value in (patterns or {}).items():
        if any(re.fullmatch(rf"(?:.*\.)?(?:{pattern})", name) for name in names):
            return float(value)
    return default
