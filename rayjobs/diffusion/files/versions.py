"""What single files of each version come with on the hub: configurations, sampler, side.

Tables alone; which version a file is of, `single` tells.
"""

SIDES = {"sd1": 512, "sd2": 512}
"""Pixels by the version of a single file; 1024 of others."""
CONFIGS = {
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "refiner": "stabilityai/stable-diffusion-xl-refiner-1.0",
    "ssd-1b": "segmind/SSD-1B",
    "vega": "segmind/Segmind-Vega",
    "playground": "playgroundai/playground-v2.5-1024px-aesthetic",
    "sd1": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd2": "stabilityai/stable-diffusion-2-1-base",
}
"""Where configurations and tokenizers of single files come from, on the hub."""
V_CONFIGS = {"sd2": "stabilityai/stable-diffusion-2-1"}
V_SIDES = {"sd2": 768}
"""The same for those that predict v, where it makes a difference."""

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TABLES = BETAS | {"num_train_timesteps": 1000, "steps_offset": 1, "set_alpha_to_one": False}
EULER = TABLES | {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}
PNDM = TABLES | {"_class_name": "PNDMScheduler", "skip_prk_steps": True}
DDIM = TABLES | {"_class_name": "DDIMScheduler", "clip_sample": False}
EDM = {"_class_name": "EDMDPMSolverMultistepScheduler", "sigma_data": 0.5}
OWN_SAMPLERS = {"sd1": PNDM, "sd2": DDIM, "playground": EDM}
"""As on the hub, for single files; Euler's for the versions of SDXL."""
