"""From the rows of a step to tensors: latents, noise, levels and conditioning.

Owns encoding and its cache, and the making of a step's batches a step ahead of their use. Knows
nothing of losses or of gradients. Legend: B rows, C H W latents.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch

from rayjobs.config import BadInput
from rayjobs.diffusion.vae.latents import encode_moments
from rayjobs.dreambooth.data import bucketing
from rayjobs.dreambooth.data.cache import Cache, Tensors
from rayjobs.dreambooth.data.schedule import Curriculum, Row, View, micro_batches
from rayjobs.dreambooth.training.networks import Networks, Text
from rayjobs.dreambooth.training.objective import Objective

MOST_TEXTS = 64


@dataclass(frozen=True)
class Batch:
    """Rows that share a forward pass. float32 on the CPU until `to`."""

    z_BCHW: torch.Tensor
    noise_BCHW: torch.Tensor
    levels_B: torch.Tensor
    time_ids_B6: torch.Tensor
    is_prior_B: torch.Tensor
    dropout_keys_B: torch.Tensor
    captions: list[str | None]
    text: Text | None
    """None where the text encoders train and must be run."""

    def to(self, device: str) -> "Batch":
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor)
        }
        if self.text is not None:
            pooled_BP = self.text.pooled_BP
            pooled_BP = None if pooled_BP is None else pooled_BP.to(device)
            moved["text"] = Text(self.text.states_BLD.to(device), pooled_BP)
        return replace(self, **moved)


class Batches:
    """Makes the batches of any step of one worker."""

    def __init__(
        self,
        curriculum: Curriculum,
        networks: Networks,
        objective: Objective,
        cache: Cache | None,
        noise_offset: float = 0.0,
    ):
        self.curriculum = curriculum
        self.networks = networks
        self.objective = objective
        self.cache = cache
        self.noise_offset = noise_offset
        self._said: dict[str | None, Tensors] = {}
        """Texts encoded without a cache."""

    def fill_cache(self, rank: int, num_workers: int) -> None:
        """Encode this worker's share of what no cache has yet."""
        if self.cache is None:
            return
        views = {f"view-{view.name}": view for view in self.curriculum.views()}
        # Shared out before anybody looks what is there: others are storing theirs in the meantime.
        for name in self.cache.missing(list(views)[rank::num_workers]):
            self.cache.put(name, self._moments([views[name]])[0])
        if self.networks.runs_text:
            return
        captions: list[str | None] = [None, *self.curriculum.captions()]
        texts = {_text_name(caption): caption for caption in captions}
        for name in self.cache.missing(list(texts)[rank::num_workers]):
            self.cache.put(name, self._states(texts[name]))

    def steps(
        self, first: int, last: int, rank: int, num_workers: int, most: int | None
    ) -> Iterator[list[Batch]]:
        """The batches of steps first .. last - 1, each made while the one before is trained on.

        Not so on a CPU: two pools of OpenMP threads on the same cores cost more than that hides.
        """

        def make(step: int) -> list[Batch]:
            rows = self.curriculum.rows(step, rank, num_workers)
            return [self.batch(part) for part in micro_batches(rows, most)]

        if self.networks.model.device == "cpu":
            yield from map(make, range(first, last))
            return
        with ThreadPoolExecutor(1) as ahead:
            coming = ahead.submit(make, first)
            for step in range(first, last):
                made = coming.result()
                if step + 1 < last:
                    coming = ahead.submit(make, step + 1)
                yield made

    def batch(self, rows: list[Row]) -> Batch:
        """Tensors of rows whose views have one size."""
        latents = self._latents(rows)
        shape = tuple(latents[0].shape)
        frames = [bucketing.time_ids(row.view.photo, row.view.frame) for row in rows]
        return Batch(
            z_BCHW=torch.stack(latents),
            noise_BCHW=torch.stack([self._noise(row, shape) for row in rows]),
            levels_B=torch.tensor([self.objective.draw(row.chance) for row in rows]),
            time_ids_B6=torch.tensor(frames, dtype=torch.float32),
            is_prior_B=torch.tensor([row.view.is_prior for row in rows]),
            dropout_keys_B=torch.tensor([row.dropout_key for row in rows]),
            captions=[row.caption for row in rows],
            text=None if self.networks.runs_text else self._text(rows),
        )

    def _latents(self, rows: list[Row]) -> list[torch.Tensor]:
        """Each row's latents (C, H, W), drawn from the autoencoder's posterior and scaled."""
        if self.cache is None:
            found = self._moments([row.view for row in rows])
        else:
            found = [self.cache.get(f"view-{row.view.name}") for row in rows]
        model = self.networks.model
        mean, scale = (t[0].float().cpu() for t in model.latents_mean_std)
        latents = []
        for row, moments in zip(rows, found, strict=True):
            std = (0.5 * moments["logvar"].clamp(-30, 20)).exp()
            z_CHW = moments["mean"] + std * row.noise(tuple(std.shape), "posterior")
            latents.append((z_CHW - mean) * model.vae.config.scaling_factor / scale)
        return latents

    def _noise(self, row: Row, shape: tuple[int, ...]) -> torch.Tensor:
        noise_CHW = row.noise(shape, "noise")
        if self.noise_offset:
            noise_CHW = noise_CHW + self.noise_offset * row.noise((shape[0], 1, 1), "offset")
        return noise_CHW

    def _moments(self, views: list[View]) -> list[Tensors]:
        """What the autoencoder makes of views of one size, all in one call."""
        pixels = [bucketing.to_pixels(view.frame.cut(view.photo.open())) for view in views]
        encoded = encode_moments(torch.stack(pixels), self.networks.model)
        means, logvars = (each.float().cpu() for each in encoded)
        for view, mean, logvar in zip(views, means, logvars, strict=True):
            if not bool(mean.isfinite().all() and logvar.isfinite().all()):
                name = view.photo.name
                raise BadInput(f"{name}: the autoencoder gives NaN for it in this precision")
        pairs = zip(means, logvars, strict=True)
        return [{"mean": mean, "logvar": logvar} for mean, logvar in pairs]

    @torch.no_grad()
    def _states(self, caption: str | None) -> Tensors:
        text = self.networks.encode([caption])
        found = {"states": text.states_BLD[0]}
        if text.pooled_BP is not None:
            found["pooled"] = text.pooled_BP[0]
        return {name: tensor.float().cpu() for name, tensor in found.items()}

    def _known_states(self, caption: str | None) -> Tensors:
        if self.cache is not None:
            return self.cache.get(_text_name(caption))
        if caption not in self._said:
            if len(self._said) == MOST_TEXTS:
                self._said.clear()
            self._said[caption] = self._states(caption)
        return self._said[caption]

    def _text(self, rows: list[Row]) -> Text:
        found = [self._known_states(row.caption) for row in rows]
        pooled = [each["pooled"] for each in found if "pooled" in each]
        states_BLD = torch.stack([each["states"] for each in found])
        return Text(states_BLD, torch.stack(pooled) if pooled else None)


def _text_name(caption: str | None) -> str:
    return "no text" if caption is None else f"text-{caption}"
