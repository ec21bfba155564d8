"""What a model's configuration says of the pictures it makes: family, side, usual steps, guidance.

Owns these rules, for a model in memory as for one of which only the files were read. Imports
neither torch nor diffusers.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rayjobs.diffusion.sampler_names import Prediction

FAMILIES = {
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusionXLImg2ImgPipeline": "sdxl",
    "StableDiffusionXLInpaintPipeline": "sdxl",
    "StableDiffusionPipeline": "sd",
    "StableDiffusionImg2ImgPipeline": "sd",
    "StableDiffusionInpaintPipeline": "sd",
}
"""By the class of a model's pipeline."""

LATENTS = 4
"""Channels of the latents of all models that are drawn here."""
INPAINTING = 9
"""Channels that the UNets of inpainting models take: latents, a mask, and the masked picture's
latents."""

STEPS = 30
FEW_STEPS = 4
MOST_FEW_STEPS = 12
MOST_FEW_GUIDANCE = 2.0
LCM_GUIDANCE = 8.0
NAMES = re.compile(
    r"(?<![a-z])(turbo|lightning|lcm|tcd|pcm|dmd2?|hyper(?=[-_ ]?(?:sd|\d+[-_ ]?step)))"
    r"(?![a-rt-z])"
)
"""Names of distilled models, as makers put them into titles and ids."""
NUMBER = re.compile(r"(?<!\d)(\d)[-_ ]?steps?(?![a-z])")
ONE_STEP = re.compile(r"(?<!\d)1[-_ ]?steps?(?![a-z])")
X0 = re.compile(r"(?<![a-z0-9])x0(?![a-z0-9])")
MADE_FOR = re.compile(r"\d[-_ ]?steps?(?![a-z])|sd[-_ ]?xl|sd[-_ ]?(?:1\.?5|15|turbo)")
ONE_STEP_LEVELS = {"Hyper": 800, "DMD": 399, "DMD2": 399}
"""The timesteps at which models distilled to one step begin, by kind; the others begin at the last.
"""
OWN_SAMPLERS = {
    **dict.fromkeys(("LCM", "DMD", "DMD2"), "LCMScheduler"),
    **dict.fromkeys(("TCD", "PCM"), "TCDScheduler"),
}
"""Of distilled models, by kind."""
SAME_FOR_ALL = ("pytorch_lora_weights", "adapter_model")
LABELS = {"turbo": "Turbo", "lightning": "Lightning", "lcm": "LCM", "hyper": "Hyper"}


@dataclass(frozen=True)
class Usual:
    """What a model is usually asked for, and for a distilled one what it is called."""

    steps: int
    guidance_scale: float
    kind: str | None = None
    timesteps: tuple[int, ...] | None = None
    """Of its steps, where its sampler would choose others."""

    def warning(self, steps: int, guidance_scale: float) -> str | None:
        """Why a picture of so many steps and so much guidance is not what such a model is for."""
        too_many = steps > MOST_FEW_STEPS
        too_strong = guidance_scale > max(MOST_FEW_GUIDANCE, self.guidance_scale)
        if self.kind is None or not (too_many or too_strong):
            return None
        asked = f"{steps} steps" if too_many else ""
        asked += " and " if too_many and too_strong else ""
        asked += f"guidance {guidance_scale:g}" if too_strong else ""
        guidance = f"guidance {self.guidance_scale:g}" if self.guidance_scale > 1 else "no guidance"
        made_for = f"{self.steps} steps and {guidance}"
        return f"{asked} spoil the pictures of {self.kind} models, which are made for {made_for}"


def vae_scale(vae: Mapping[str, Any]) -> int:
    """Pixels per latent, along a side."""
    return int(2 ** (len(vae.get("block_out_channels", [0] * 4)) - 1))


def default_side(unet: Mapping[str, Any], vae: Mapping[str, Any]) -> int:
    """Pixels along a side of the pictures that the model was trained on."""
    return int(unet.get("sample_size", 128)) * vae_scale(vae)


def needs_mask(unet: Mapping[str, Any]) -> bool:
    """Whether a model only makes masked parts of pictures anew."""
    return bool(unet.get("in_channels", LATENTS) == INPAINTING)


def as_told(scheduler: Mapping[str, Any], prediction_type: str) -> dict[str, Any]:
    """A sampler's configuration with what a caller says that the UNet predicts.

    Noise cannot be predicted where there is nothing else, so epsilon has no zero terminal SNR.
    """
    told: dict[str, Any] = {"prediction_type": prediction_type}
    if prediction_type == "epsilon" and scheduler.get("rescale_betas_zero_snr"):
        told["rescale_betas_zero_snr"] = False
    return {**scheduler, **told}


def is_flow(scheduler: Mapping[str, Any]) -> bool:
    """Whether a sampler's configuration is that of a model of flow matching."""
    named = str(scheduler.get("_class_name")).startswith("FlowMatch")
    said = str(scheduler.get("prediction_type")).startswith(("flow", "rectified_flow"))
    return named or said or bool(scheduler.get("use_flow_sigmas"))


def names_of(*configs: Mapping[str, Any]) -> str:
    """The last parts of the names that configurations were saved under."""
    names = (str(config.get("_name_or_path") or "") for config in configs)
    return " ".join(name.rstrip("/").rpartition("/")[2] for name in names)


def usual(
    family: str, scheduler: Mapping[str, Any], unet: Mapping[str, Any], names: str = ""
) -> Usual:
    """What the makers recommend: of Playground v2.5, SDXL, Stable Diffusion and distilled models.

    `scheduler` and `unet` are configurations, `names` what the files call the model. Distilled are:
    a UNet that takes guidance as an input, a sampler of LCM or TCD, one of Euler with trailing
    timesteps for a model that predicts noise (Turbo and Lightning), and what is named so.
    """
    if unet.get("time_cond_proj_dim") is not None:
        return Usual(FEW_STEPS, LCM_GUIDANCE, "LCM")
    kind = _distilled(scheduler, names)
    if kind is not None:
        return Usual(_named_steps(names), 1.0, kind)
    prediction = Prediction.of(scheduler)
    if prediction.is_edm and prediction.kind == "epsilon":
        return Usual(STEPS, 3.0)
    return Usual(STEPS, 5.0 if family == "sdxl" else 7.5)


def adapter_usual(names: str) -> Usual | None:
    """The steps and guidance of an adapter that makes a model a distilled one; None of others.

    Only what its file, folder or title is named tells it. Subjects are called turbo and lightning
    too: with these the name must also tell the steps or the base model.
    """
    kind = distilled_name(names)
    is_subject = kind in ("Turbo", "Lightning") and not MADE_FOR.search(_spaced(names))
    if is_subject:
        return None
    return None if kind is None else Usual(_named_steps(names), 1.0, kind)


def model_hint(name: str) -> str:
    """A model's file name, where it tells that the model is a distilled one; else nothing.

    As of adapters: the name must tell the base model or the steps besides, or be of no subject.
    """
    kind, spaced = distilled_name(name), _spaced(name)
    is_subject = kind in ("Turbo", "Lightning") and not re.search(r"\dstep|xl|sd", spaced)
    return "" if kind is None or (is_subject and not MADE_FOR.search(spaced)) else name


def one_step(name: str) -> str | None:
    """What the UNet of a distilled model for one step predicts, by its file's name."""
    is_x0 = ONE_STEP.search(_spaced(name)) and distilled_name(name) == "Lightning"
    return "sample" if is_x0 and X0.search(name) else None


def one_step_level(name: str) -> int | None:
    """The timestep at which a distilled model for one step begins, by its file's name."""
    kind = distilled_name(name) if ONE_STEP.search(_spaced(name)) else None
    return None if kind is None else ONE_STEP_LEVELS.get(kind)


def file_name(uri: str) -> str:
    """What a file is called: its folder's name where the file's own is the same for all."""
    *folders, name = uri.rstrip("/").replace("\\", "/").split("/")
    stem = name.removesuffix(".safetensors")
    return folders[-1] if folders and stem in SAME_FOR_ALL else stem


def distilled_sampler(usual: Usual, scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """What a distilled model changes of a sampler that is meant for many steps.

    Some come with a sampler of their own; the others begin at the last noise level.
    """
    is_plain = not Prediction.of(scheduler).is_edm and _distilled(scheduler, "") is None
    if usual.kind is None or not is_plain:
        return {}
    own = OWN_SAMPLERS.get(usual.kind) if usual.timesteps is None else "LCMScheduler"
    return {"timestep_spacing": "trailing"} if own is None else {"_class_name": own}


def distilled_name(titles: str) -> str | None:
    """The kind of distilled model that a title names."""
    named = NAMES.search(_spaced(titles))
    return LABELS.get(named[1], named[1].upper()) if named else None


def _spaced(names: str) -> str:
    """Names in small letters, their words apart: `realvisXLLightning` is `realvis_xl_lightning`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", names).lower()


def _named_steps(names: str) -> int:
    number = NUMBER.search(_spaced(names))
    return int(number[1]) if number and int(number[1]) else FEW_STEPS


def _distilled(scheduler: Mapping[str, Any], names: str) -> str | None:
    named = distilled_name(names)
    if named:
        return named
    sampler = str(scheduler.get("_class_name"))
    if sampler in ("LCMScheduler", "TCDScheduler"):
        return "LCM" if sampler == "LCMScheduler" else "Hyper or TCD"
    is_euler = sampler in ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
    is_trailing = scheduler.get("timestep_spacing") == "trailing"
    plain = Prediction.of(scheduler) == Prediction()
    return "Turbo or Lightning" if is_euler and is_trailing and plain else None
