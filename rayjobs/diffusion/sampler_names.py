"""The names of samplers, and which of them fit which model.

Owns the table from short names to diffusers' classes, and what a model's prediction asks of them.
Knows neither torch nor diffusers, so that a front end can refuse a wrong name without loading
either.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

EDM = ("EDMDPMSolverMultistepScheduler", "EDMEulerScheduler")

# Short name: diffusers' class and the options that make it what the name says elsewhere.
SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddim_parallel": ("DDIMParallelScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "ddpm_parallel": ("DDPMParallelScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpmpp_2m_sde_karras": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
    ),
    "dpmpp_2s": ("DPMSolverSinglestepScheduler", {}),
    "dpmpp_sde": ("DPMSolverSDEScheduler", {}),
    "dpmpp_sde_karras": ("DPMSolverSDEScheduler", {"use_karras_sigmas": True}),
    "edm_dpmpp_2m": ("EDMDPMSolverMultistepScheduler", {}),
    "edm_euler": ("EDMEulerScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "euler_karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "heun": ("HeunDiscreteScheduler", {}),
    "ipndm": ("IPNDMScheduler", {}),
    "kdpm2": ("KDPM2DiscreteScheduler", {}),
    "kdpm2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "sa_solver": ("SASolverScheduler", {}),
    "tcd": ("TCDScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
CLASSES = frozenset(name for name, _ in SAMPLERS.values())
LIBRARY = {"LMSDiscreteScheduler": "scipy", "DPMSolverSDEScheduler": "torchsde"}

ZERO_SNR = frozenset(
    {
        "DDIMParallelScheduler",
        "DDIMScheduler",
        "DDPMParallelScheduler",
        "DDPMScheduler",
        "DPMSolverMultistepScheduler",
        "EulerAncestralDiscreteScheduler",
        "EulerDiscreteScheduler",
        "LCMScheduler",
        "TCDScheduler",
        "UniPCMultistepScheduler",
    }
)
"""Those with the option `rescale_betas_zero_snr`; the others pass over it without a word."""
ONLY_EPSILON = frozenset({"IPNDMScheduler"})
"""Those without the option `prediction_type`."""

TAKES_TIMESTEPS = frozenset(
    {
        "DDPMParallelScheduler",
        "DDPMScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "LCMScheduler",
        "TCDScheduler",
    }
)
"""Those whose schedule can be given as timesteps."""
TAKES_SIGMAS = frozenset({"EulerDiscreteScheduler"})
"""Those whose schedule can be given as sigmas. UniPC takes them for flow matching alone, and EDM's
Euler sampler takes not these but what it makes them of."""

PREDICTIONS = ("epsilon", "v_prediction", "sample")
"""What a UNet may predict: the noise, the velocity, or the picture itself."""


@dataclass(frozen=True)
class Prediction:
    """What a UNet was trained to predict, and of which noise: a sampler has to fit it."""

    kind: str = "epsilon"
    """As diffusers spells it: epsilon, v_prediction or sample."""
    zero_snr: bool = False
    """The last of its noise levels leaves nothing of the picture (arXiv 2305.08891)."""
    is_edm: bool = False
    """With EDM's preconditioning (arXiv 2206.00364), as Playground v2.5."""

    @staticmethod
    def of(scheduler: Mapping[str, Any]) -> "Prediction":
        """That of a model with a sampler of this configuration, `_class_name` among its keys."""
        return Prediction(
            str(scheduler.get("prediction_type") or "epsilon"),
            bool(scheduler.get("rescale_betas_zero_snr")),
            scheduler.get("_class_name") in EDM,
        )

    def misfit(self, class_name: str) -> str | None:
        """Why a sampler's class would draw such a model wrongly, or None."""
        if (class_name in EDM) != self.is_edm:
            return "an EDM model" if self.is_edm else "a model that is not EDM"
        if self.zero_snr and class_name not in ZERO_SNR:
            return "a model of zero terminal SNR"
        if self.kind != "epsilon" and class_name in ONLY_EPSILON:
            return f"a model of {self.kind.replace('_', '-')}"
        return None


EPSILON = Prediction()


def check_name(name: str, prediction: Prediction) -> tuple[str, dict[str, Any]]:
    """The diffusers class's name and preset options of a sampler.

    Raises ValueError when the name is unknown, or the sampler is not for such a model.
    """
    class_name, preset = SAMPLERS.get(name, (name, {}))
    if class_name not in CLASSES:
        raise ValueError(
            f"unknown sampler {name!r}; known are {', '.join(sorted(SAMPLERS))} "
            "and their diffusers class names"
        )
    kind = prediction.misfit(class_name)
    if kind is not None:
        names = ", ".join(fitting(prediction))
        raise ValueError(f"sampler {name!r} does not fit {kind}; use one of {names}")
    return class_name, preset


def check_schedule_taken(
    name: str, schedule: str, prediction: Prediction = EPSILON, made_for: Sequence[int] = ()
) -> None:
    """Raise ValueError where a sampler cannot be given its `schedule`, timesteps or sigmas.

    It is the model's own where that is `made_for` certain timesteps.
    """
    if not _takes(name, schedule):
        names = ", ".join(each for each in fitting(prediction) if _takes(each, schedule))
        way_out = f"use one of {names}" if names else f"leave {schedule} out"
        why = f"the model is made for a step at {made_for[0]}, but " if made_for else ""
        raise ValueError(f"{why}sampler {name!r} takes no {schedule}; {way_out}")


def _takes(name: str, schedule: str) -> bool:
    """Those of Karras' noise levels have no others."""
    class_name, preset = SAMPLERS.get(name, (name, {}))
    takes = TAKES_TIMESTEPS if schedule == "timesteps" else TAKES_SIGMAS
    return class_name in takes and not preset.get("use_karras_sigmas")


def fitting(prediction: Prediction) -> list[str]:
    """Short names of the samplers that such a model can be drawn with."""
    return sorted(n for n, (kind, _) in SAMPLERS.items() if prediction.misfit(kind) is None)
