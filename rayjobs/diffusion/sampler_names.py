"""The names of samplers, and which of them fit which model.

Owns the table from short names to diffusers' classes. Knows neither torch nor diffusers, so that a
front end can refuse a wrong name without loading either.
"""

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


def check_name(name: str, edm_model: bool) -> tuple[str, dict[str, Any]]:
    """The diffusers class's name and preset options of a sampler.

    Raises ValueError when the name is unknown, or the sampler is not for such a model.
    """
    class_name, preset = SAMPLERS.get(name, (name, {}))
    if class_name not in CLASSES:
        raise ValueError(
            f"unknown sampler {name!r}; known are {', '.join(sorted(SAMPLERS))} "
            "and their diffusers class names"
        )
    if (class_name in EDM) != edm_model:
        fitting = sorted(n for n, (c, _) in SAMPLERS.items() if (c in EDM) == edm_model)
        kind = "an EDM model" if edm_model else "a model that is not EDM"
        raise ValueError(f"sampler {name!r} does not fit {kind}; use one of {', '.join(fitting)}")
    return class_name, preset
