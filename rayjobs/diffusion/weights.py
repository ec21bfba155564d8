"""A model's files: where they may be, what is refused, and the identity they give the model.

Reads headers and configs only, so that a job can refuse a bad model before a worker starts. Knows
no storage beyond local paths and the Hugging Face hub, and imports no torch.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from rayjobs.diffusion import facts
from rayjobs.diffusion.facts import FAMILIES, Usual
from rayjobs.diffusion.files import beside, foreign
from rayjobs.diffusion.files.folder import (
    PARTS,
    PICKLES,
    check_folder,
    check_tokenizer,
    check_unet,
    pickle_message,
    read_json,
    refuse_pickles,
)
from rayjobs.diffusion.files.header import is_safetensors, read_header
from rayjobs.diffusion.files.hub import download
from rayjobs.diffusion.files.identity import identity_files, sha256_of
from rayjobs.diffusion.files.single import Single, read_single
from rayjobs.diffusion.files.versions import (
    CONFIGS,
    DDIM,
    EULER,
    OWN_SAMPLERS,
    SIDES,
    V_CONFIGS,
    V_SIDES,
)
from rayjobs.diffusion.sampler_names import PREDICTIONS, Prediction

STARTER = Path(__file__).parents[1] / "starter" / "model"
REFINER = (
    "is an SDXL refiner, which draws over what another model made; name it as the model of one of "
    "passes, and give a base model here"
)
FOLLOWING = "StableDiffusionXLImg2ImgPipeline"
PIPELINES = {"sdxl": "StableDiffusionXLPipeline", "sd": "StableDiffusionPipeline"}


@dataclass(frozen=True)
class Weights:
    """The files of one model: a diffusers folder, or a single safetensors file and what it lacks.

    `config` is the folder or hub id whose configurations and tokenizers a single file uses, `base`
    the model of whose parts it uses those that it lacks. `prediction_type` is what the caller says
    that the UNet predicts, whatever the files say.
    """

    path: Path
    class_name: str
    single: Single | None = None
    config: str | None = None
    base: "Weights | None" = None
    prediction_type: str | None = None
    names: str = ""
    """What the caller and the files call it."""
    variants: Mapping[str, str | None] = field(default_factory=dict)
    """Of a folder's parts with weights."""
    is_refiner: bool = False
    """Whether it only draws over what another model made."""

    @property
    def family(self) -> str:
        return FAMILIES[self.class_name]

    @property
    def kind(self) -> str:
        """Of PARTS: which parts it has."""
        return "refiner" if self.is_refiner else self.family

    @cached_property
    def config_folder(self) -> Path | None:
        """The local folder of a single file's configurations, as far as one was named."""
        if self.config is None:
            return None if self.base is None else self.base.path
        folder = Path(self.config)
        return folder if folder.is_dir() else download(self.config, None, weights=False)

    def load_config_folder(self) -> Path:
        """The same, from the hub where none was named. Raises ValueError when it is not there."""
        if self.config_folder is not None:
            return self.config_folder
        assert self.single is not None
        is_v = self.prediction.kind == "v_prediction"
        version = self.single.version
        hub_id = V_CONFIGS.get(version, CONFIGS[version]) if is_v else CONFIGS[version]
        try:
            folder = download(hub_id, None, weights=False)
        except ValueError as error:
            raise ValueError(
                f"{error}; {self.path.name} needs configurations and tokenizers: give model.config "
                "a diffusers folder with them"
            ) from None
        replace(self, config=str(folder)).check_config()
        return folder

    def check_config(self) -> None:
        """Raise ValueError when a single file does not fit the configuration that is at hand."""
        folder = self.config_folder
        if self.single is None or folder is None:
            return
        read_json(folder / "model_index.json")
        for name in PARTS[self.kind]:
            if name.startswith("tokenizer"):
                check_tokenizer(folder / name)
            else:
                read_json(folder / name / "config.json")
        vae = read_json(folder / "vae" / "config.json")
        self.single.check_config(self.unet_config(folder), vae, str(folder))

    def unet_config(self, folder: Path) -> dict[str, Any]:
        """Of a UNet alone, its own; else the one in a folder of configurations, which may be those
        of the model that a single file of an inpainting model was made from."""
        own = self.path / "config.json"
        config = read_json(own if own.is_file() else folder / "unet" / "config.json")
        if self.single is None or config.get("in_channels", facts.LATENTS) == self.single.channels:
            return config
        return config | {"in_channels": self.single.channels}

    @property
    def needs_mask(self) -> bool:
        """Whether the model only makes masked parts of pictures anew."""
        return facts.needs_mask(self._unet_config)

    @cached_property
    def scheduler(self) -> dict[str, Any]:
        """The configuration of the model's own sampler, with `_class_name`."""
        values = self._configured_scheduler
        if self.single is not None:
            decided = dict(self.single.scheduler)
            if decided.get("_class_name", values["_class_name"]) != values["_class_name"]:
                values = {}
            guess = {"prediction_type": self.single.guess} if self._is_guessed else {}
            values = {**values, **guess, **decided}
            if Prediction.of(values).misfit(str(values["_class_name"])) is not None:
                own = EULER if self.family == "sdxl" else DDIM
                values["_class_name"] = own["_class_name"]
            values |= facts.distilled_sampler(self.usual_of(values), values)
        told = self.prediction_type
        return values if told is None else facts.as_told(values, told)

    @property
    def vae_config(self) -> dict[str, Any] | None:
        """Of its autoencoder; None of a single file without a configuration at hand."""
        folder = self.path if self.single is None else self.config_folder
        own = {} if self.single is None else self.single.latents
        return None if folder is None else {**read_json(folder / "vae" / "config.json"), **own}

    @property
    def scheduler_name(self) -> str:
        """The class of the model's own sampler."""
        return str(self.scheduler["_class_name"])

    @property
    def prediction(self) -> Prediction:
        return Prediction.of(self.scheduler)

    @property
    def is_edm(self) -> bool:
        return self.prediction.is_edm

    @cached_property
    def default_side(self) -> int:
        """Pixels along a side of the pictures that the model was trained on."""
        folder = self.path if self.single is None else self.config_folder
        if folder is None:
            assert self.single is not None
            sides = SIDES | V_SIDES if self.prediction.kind == "v_prediction" else SIDES
            return sides.get(self.single.version, 1024)
        vae = read_json(folder / "vae" / "config.json")
        return facts.default_side(self.unet_config(folder), vae)

    @cached_property
    def usual(self) -> Usual:
        """The steps and guidance that the model is made for."""
        return self.usual_of(self.scheduler)

    def usual_of(self, scheduler: Mapping[str, Any]) -> Usual:
        """The same, were the model's own sampler of this configuration."""
        usual = facts.usual(self.family, scheduler, self._unet_config, self.names)
        level = None if self.single is None else facts.one_step_level(self.path.stem)
        return usual if level is None else replace(usual, steps=1, timesteps=(level,))

    @cached_property
    def sha256(self) -> str:
        """SHA-256 over the sorted list of (relative path, SHA-256) of every weight and config.

        For a single file, what it takes from a base, and a sampler that its configuration does not
        tell, are in the list too.
        """
        files = identity_files(self.path, self.single)
        hashes = sorted([name, sha256_of(file)] for name, file in files)
        if self.base is not None:
            hashes.append(["base", self.base.sha256])
        if _drawing(self.scheduler) != _drawing(self._configured_scheduler):
            hashes.append(["scheduler", _drawing(self.scheduler)])
        return hashlib.sha256(json.dumps(hashes, separators=(",", ":")).encode()).hexdigest()

    @cached_property
    def _configured_scheduler(self) -> dict[str, Any]:
        """The sampler of the folder's configuration, or that of a single file's version."""
        folder = self.path if self.single is None else self.config_folder
        if folder is None:
            assert self.single is not None
            own = OWN_SAMPLERS.get(self.single.version, EULER)
            return own | {"prediction_type": "v_prediction"} if own is DDIM else dict(own)
        values = read_json(folder / "scheduler" / "scheduler_config.json")
        if not isinstance(values.get("_class_name"), str):
            raise ValueError(f"{folder}/scheduler: scheduler_config.json names no class")
        return values

    @property
    def _is_guessed(self) -> bool:
        """Whether neither the file nor a configuration says what the UNet predicts."""
        return (
            self.config_folder is None and self.single is not None and self.single.version == "sd2"
        )

    @property
    def _unet_config(self) -> Mapping[str, Any]:
        if self.single is None:
            return read_json(self.path / "unet" / "config.json")
        marks = ("time_embedding.cond_proj.weight", "time_embed.cond_proj.weight")
        has_guidance = any(name.endswith(marks) for name in self.single.header.names)
        guidance = {"time_cond_proj_dim": 1} if has_guidance else {}
        return guidance | {"in_channels": self.single.channels}


def _drawing(scheduler: Mapping[str, Any]) -> str:
    """What of a sampler's configuration decides pictures, as far as a file may change it."""
    spacing = scheduler.get("timestep_spacing", "leading")
    return f"{scheduler['_class_name']} {spacing} {Prediction.of(scheduler)}"


@dataclass(frozen=True, kw_only=True)
class Source:
    """Which model: `starter`, a local folder or file, or a hub id; and what it does not say itself.

    The other fields are those of `Weights`; `revision` is a branch, tag or commit of the hub id.
    `follows` says that it is to draw over what another model made, which a refiner may do.
    """

    uri: str
    config: str | None = None
    base: str | None = None
    revision: str | None = None
    prediction_type: str | None = None
    follows: bool = False


def locate(source: str | Source) -> Weights:
    """Find the files of a model.

    Raises ValueError: nothing is there, it is a pickle, it is damaged, or it is another family.
    """
    source = Source(uri=source) if isinstance(source, str) else source
    uri = source.uri
    path = STARTER if uri == "starter" else Path(uri)
    if path.exists() and source.revision is not None:
        raise ValueError(f"revision {source.revision!r} is for a hub id, and {uri!r} is none")
    if path.is_file():
        found = _single_file(path)
    else:
        found = _folder(path if path.is_dir() else download(uri, source.revision), uri)
    if found.is_refiner and not source.follows:
        raise ValueError(f"model {uri!r} {REFINER}")
    if source.base is not None and found.single is None:
        raise ValueError(f"model {uri!r} is whole; base is for a file that lacks parts")
    found = replace(
        found,
        config=None if found.single is None else source.config,
        base=None if source.base is None else locate(source.base),
        prediction_type=source.prediction_type,
        names=found.names if path.exists() else f"{found.names} {uri}",
    )
    if found.single is not None:
        _check_rest(found)
    _check_prediction(found)
    found.check_config()
    return found


def _single_file(path: Path) -> Weights:
    if path.suffix != ".safetensors":
        if is_safetensors(path):
            raise ValueError(f"{path} is a safetensors file; name it {path.stem}.safetensors")
        if path.suffix in PICKLES:
            raise ValueError(pickle_message(path))
        raise ValueError(f"{path} is not a model: expected a .safetensors file or a folder")
    single = read_single(read_header(path))
    try:
        told = facts.one_step(path.stem) or beside.prediction(path)
    except ValueError as error:
        raise ValueError(f"{path} {error}") from None
    if told is not None and "prediction_type" not in single.scheduler:
        single = replace(single, scheduler={**single.scheduler, "prediction_type": told})
    names = f"{single.titles} {facts.model_hint(path.stem)}"
    is_refiner = single.version == "refiner"
    pipeline = FOLLOWING if is_refiner else PIPELINES[single.family]
    return Weights(path, pipeline, single, names=names, is_refiner=is_refiner)


def _unet_folder(folder: Path) -> Weights:
    """A UNet alone, as `UNet2DConditionModel.save_pretrained` writes it."""
    config = read_json(folder / "config.json")
    kind = config.get("_class_name") or (config.get("architectures") or ["another model"])[0]
    if kind != "UNet2DConditionModel":
        raise ValueError(f"model {str(folder)!r} is a {kind} alone; give a whole model")
    check_unet(folder, config)
    refuse_pickles([folder])
    files = list(folder.glob("diffusion_pytorch_model*.safetensors"))
    if len(files) != 1:
        names = ", ".join(sorted(file.name for file in files)) or "no weights"
        raise ValueError(
            f"{folder} holds {names}; of a UNet alone a single diffusion_pytorch_model.safetensors "
            "is read"
        )
    single = read_single(read_header(files[0]))
    named = f"{single.titles} {facts.names_of(config)}"
    return Weights(folder, PIPELINES[single.family], single, names=named)


def _folder(folder: Path, uri: str) -> Weights:
    if not (folder / "model_index.json").is_file():
        if (folder / "config.json").is_file():
            return _unet_folder(folder)
        refuse_pickles([folder])
        raise ValueError(
            f"model {uri!r} is not a diffusers folder: it has no model_index.json{_inside(folder)}"
        )
    index = read_json(folder / "model_index.json")
    class_name = str(index.get("_class_name"))
    if class_name not in FAMILIES:
        raise ValueError(f"model {uri!r} is a {class_name}; supported are {', '.join(FAMILIES)}")
    is_refiner = bool(index.get("requires_aesthetics_score"))
    kind = "refiner" if is_refiner else FAMILIES[class_name]
    refuse_pickles([folder / name for name in PARTS[kind] if (index.get(name) or [None])[0]])
    variants = check_folder(folder, kind, index)
    names = facts.names_of(index, read_json(folder / "unet" / "config.json"))
    return Weights(folder, class_name, names=names, variants=variants, is_refiner=is_refiner)


def _inside(folder: Path) -> str:
    """What a folder that is no model holds instead, as the end of a sentence."""
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        return ""
    what = foreign.name_of(read_header(files[0]).names)
    return f"; it is {what}" if what else f"; give the file in it, {files[0].name}"


def _check_rest(weights: Weights) -> None:
    """Raise ValueError for a single file that lacks parts, unless a base of its kind has them."""
    single, base = weights.single, weights.base
    assert single is not None
    if base is not None and (base.single is not None or base.family != single.family):
        kind = "a single file" if base.single is not None else f"of the family {base.family}"
        raise ValueError(
            f"base {str(base.path)!r} is {kind}; {weights.path.name} needs a diffusers folder or "
            f"hub id of the family {single.family}"
        )
    if base is None and single.missing:
        lacks = f"no {' and no '.join(single.missing)}"
        holds = "only a UNet" if single.parts == {"unet"} else lacks
        kind = "SDXL" if single.family == "sdxl" else "Stable Diffusion"
        raise ValueError(
            f"{weights.path} holds {holds}; give model.base the diffusers folder or hub id of a "
            f"whole {kind} model, which has the rest"
        )


def _check_prediction(weights: Weights) -> None:
    """Raise ValueError for a model of whose prediction no sampler here makes a picture."""
    scheduler, kind = weights.scheduler, weights.prediction.kind
    if facts.is_flow(scheduler):
        raise ValueError(f"{weights.path} is a model of flow matching, which is not drawn here")
    if kind not in PREDICTIONS:
        raise ValueError(
            f"{weights.path} says that it predicts {kind!r}, which is none of "
            f"{', '.join(PREDICTIONS)}; give model.prediction_type where that is wrong"
        )
    if weights.single is not None and weights.prediction == Prediction("epsilon", zero_snr=True):
        raise ValueError(
            f"{weights.path} says zero terminal SNR and not v-prediction, which noise cannot be "
            "predicted at; give model.prediction_type=v_prediction, or epsilon to pass over it"
        )
