"""The other models of an engine, and which of them goes on with what another one made.

Owns when a refiner is loaded, and what is compared before one takes over. Knows nothing of the
calls of its rows.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rayjobs.diffusion.facts import vae_scale
from rayjobs.diffusion.model import Model, load_model
from rayjobs.diffusion.refiner.network import Network
from rayjobs.diffusion.weights import Source

NO_REFINER = "it only makes masked parts of pictures anew, which a pass has none of"
SCHEDULE = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas"),
    *("rescale_betas_zero_snr", "sigma_min", "sigma_max", "sigma_data"),
    *("timestep_spacing", "steps_offset"),
)
"""Settings of a sampler that decide which noise level belongs to a step."""

LATENTS = {"scaling_factor": 0.18215, "latents_mean": None, "latents_std": None}
LATENTS |= {"shift_factor": None, "latent_channels": 4}
"""Settings of an autoencoder that decide what its latents are, with diffusers' defaults."""


@dataclass
class Refiners:
    """Models by their local paths, each loaded once, as the engine's own is held."""

    model: Model
    build: Callable[[Model], Network]
    _loaded: dict[str, Network] = field(default_factory=dict)

    def load(self, path: str) -> Network:
        """Raises ValueError for what is no model, or none that draws over pictures."""
        if path not in self._loaded:
            source = Source(uri=path, follows=True)
            model = load_model(source, self.model.options, alone=False)
            if model.needs_mask:
                raise ValueError(f"model {path!r} does not go on with a picture: {NO_REFINER}")
            self._loaded[path] = self.build(model)
        return self._loaded[path]

    @property
    def networks(self) -> list[Network]:
        """Those loaded."""
        return list(self._loaded.values())


def check_same_latents(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Raise ValueError unless autoencoders of two configurations have the same latents."""
    one, other = _latents(before), _latents(after)
    for key, value in one.items():
        if other[key] != value:
            raise ValueError(
                f"latents of the model before have {key} {value}, those of the pass's "
                f"{other[key]}; hand over the picture instead, by strength and via pixel"
            )


def check_same_schedule(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Raise ValueError unless two samplers' configurations have the same noise at each step."""
    for key in SCHEDULE:
        one, other = before.get(key), after.get(key)
        if one != other:
            raise ValueError(
                f"denoising_start goes on with the noise of the pass before, but {key} is {one} "
                f"there and {other} here; give sampler_options one for both, or use strength"
            )


def _latents(vae: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: vae.get(name, usual) for name, usual in LATENTS.items()}
    return found | {"pixels a side": vae_scale(vae)}
