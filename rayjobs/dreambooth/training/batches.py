"""From the rows of a step to tensors: latents, noise, levels and conditioning.

Owns encoding and its cache, and prepares a step's batches while the step before is trained on.
Knows nothing of losses or gradients. Legend: B rows, C H W latents.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from cachetools import LRUCache

from rayjobs.config import BadInput
from rayjobs.diffusion.modules.upload import upload
from rayjobs.diffusion.vae.latents import encode_moments
from rayjobs.dreambooth.data import bucketing
from rayjobs.dreambooth.data.cache import Cache, Tensors
from rayjobs.dreambooth.data.schedule import BatchSchedule, Row, View, micro_batches
from rayjobs.dreambooth.training.objective import Objective
from rayjobs.dreambooth.training.tuned_model import Text, TunedModel, joined

MAX_TEXTS = 64
TELL_EVERY = 10
MAX_MASKS = 4096


@dataclass(frozen=True)
class Batch:
    """Rows that share a forward pass. float32 on the CPU until `to`."""

    z_BCHW: torch.Tensor
    noise_BCHW: torch.Tensor
    levels_B: torch.Tensor
    time_ids_B6: torch.Tensor
    is_prior_B: torch.Tensor
    has_prior: bool
    """Whether any row is a class image; known without asking the device."""
    dropout_keys_B: torch.Tensor
    mask_B1HW: torch.Tensor | None
    """Where rows' losses count, 0..1; None: everywhere."""
    captions: list[str | None]
    text: Text | None
    """None where text is trained, and encoded again at every step."""
    counts: bool = True
    """False: made again, so that sharded workers make equally many calls; its loss is dropped."""

    def to(self, device: str) -> "Batch":
        moved: dict[str, Any] = {
            name: upload(value, device)
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor)
        }
        if self.text is not None:
            moved["text"] = self.text.map(lambda tensor: upload(tensor, device))
        return replace(self, **moved)


class Batches:
    """Makes the batches of any step of one worker."""

    def __init__(
        self,
        schedule: BatchSchedule,
        tuned: TunedModel,
        objective: Objective,
        cache: Cache | None,
        noise_offset: float = 0.0,
        fixed_rows: list[Row] | None = None,
    ):
        self.schedule = schedule
        self.tuned = tuned
        self.objective = objective
        self.cache = cache
        self.noise_offset = noise_offset
        self.fixed_rows = fixed_rows or []
        """Rows whose loss is measured beside the steps'."""
        self._texts: dict[str | None, Tensors] = {}
        """Texts encoded without a cache: captions whose tags are in another order each time."""
        of_fixed = {str(row.caption) for row in self.fixed_rows}
        self._cached_captions = frozenset(of_fixed.union(schedule.captions()))
        self._known_masks: LRUCache[str, torch.Tensor] = LRUCache(MAX_MASKS)

    def fill_cache(
        self, rank: int, num_workers: int, tell: Callable[[int, int], None] | None = None
    ) -> None:
        """Encode this worker's share of what the cache lacks; `tell` hears how many of how many."""
        if self.cache is None:
            return
        every = [*self.schedule.views(), *(row.view for row in self.fixed_rows)]
        views = {f"view-{view.name}": view for view in every}
        # Split before the cache is listed: other workers are storing their shares meanwhile.
        missing = self.cache.missing(list(views)[rank::num_workers])
        for number, name in enumerate(missing):
            if tell is not None and number and number % TELL_EVERY == 0:
                tell(number, len(missing))
            self.cache.put(name, self._moments([views[name]])[0])
        if self.tuned.trains_text:
            return
        captions: list[str | None] = [None, *sorted(self._cached_captions)]
        texts = {self._text_name(caption): caption for caption in captions}
        for name in self.cache.missing(list(texts)[rank::num_workers]):
            self.cache.put(name, self._states(texts[name]))

    def steps(
        self,
        first: int,
        last: int,
        rank: int,
        num_workers: int,
        max_photos: int | None,
        *,
        equal: bool = False,
    ) -> Iterator[list[Batch]]:
        """The batches of steps first .. last - 1, each made while the one before is trained on.

        With `equal` every worker has as many of a step as the one with most, whose pictures have
        most sizes: sharded workers call the network together or wait for ever.

        On a CPU none is made ahead: a second pool of OpenMP threads on the same cores costs more
        time than it hides.
        """

        def make(step: int) -> list[Batch]:
            def parts(rank: int) -> list[list[Row]]:
                return micro_batches(self.schedule.rows(step, rank, num_workers), max_photos)

            made = [self.batch(part) for part in parts(rank)]
            most = max(len(parts(other)) for other in range(num_workers)) if equal else 0
            filling = [replace(made[-1], counts=False)] * (most - len(made))
            return [*filling, *made]

        if self.tuned.model.device == "cpu":
            yield from map(make, range(first, last))
            return
        with ThreadPoolExecutor(1) as pool:
            upcoming = pool.submit(make, first)
            for step in range(first, last):
                batches = upcoming.result()
                if step + 1 < last:
                    upcoming = pool.submit(make, step + 1)
                yield batches

    def batch(self, rows: list[Row]) -> Batch:
        """Tensors of rows whose views have one size."""
        latents = self._latents(rows)
        shape = tuple(latents[0].shape)
        time_ids = [bucketing.time_ids(row.view.photo, row.view.frame) for row in rows]
        return Batch(
            z_BCHW=torch.stack(latents),
            noise_BCHW=torch.stack([self._noise(row, shape) for row in rows]),
            levels_B=torch.tensor([self.objective.level(row.quantile) for row in rows]),
            time_ids_B6=torch.tensor(time_ids, dtype=torch.float32),
            is_prior_B=torch.tensor([row.view.is_prior for row in rows]),
            has_prior=any(row.view.is_prior for row in rows),
            dropout_keys_B=torch.tensor([row.dropout_key for row in rows]),
            mask_B1HW=self._masks(rows, shape[1:]),
            captions=[row.caption for row in rows],
            text=None if self.tuned.trains_text else self._text(rows),
        )

    def _latents(self, rows: list[Row]) -> list[torch.Tensor]:
        """Each row's latents (C, H, W), sampled from the autoencoder's posterior and scaled."""
        if self.cache is None:
            all_moments = self._moments([row.view for row in rows])
        else:
            all_moments = [self.cache.get(f"view-{row.view.name}") for row in rows]
        model = self.tuned.model
        mean, scale = (t[0].float().cpu() for t in model.latents_mean_std)
        latents = []
        for row, moments in zip(rows, all_moments, strict=True):
            std = (0.5 * moments["logvar"].clamp(-30, 20)).exp()
            z_CHW = moments["mean"] + std * row.noise(tuple(std.shape), "posterior")
            latents.append((z_CHW - mean) * model.vae.config.scaling_factor / scale)
        return latents

    def _masks(self, rows: list[Row], size: tuple[int, ...]) -> torch.Tensor | None:
        """(B, 1, H, W) at the latents' size: 1 for class images and photographs without a mask."""
        config = self.schedule.config
        if config.masks == "none":
            return None
        masks_B1HW = torch.ones(len(rows), 1, *size)
        for mask_1HW, row in zip(masks_B1HW, rows, strict=True):
            if not row.view.is_prior:
                mask_1HW.copy_(self._mask(row.view, config.masks, size))
        return config.mask_floor + (1 - config.mask_floor) * masks_B1HW

    def _mask(self, view: View, kind: str, size: tuple[int, ...]) -> torch.Tensor:
        """(1, H, W): the mean of the pixels' mask over each latent."""
        name = f"{kind}-{view.photo.mask_sha256}-{view.name}"
        if name not in self._known_masks:
            mask = view.photo.open_alpha() if kind == "alpha" else view.photo.open_mask()
            if mask is None:
                self._known_masks[name] = torch.ones(1, *size)
            else:
                pixels_HW = torch.from_numpy(np.array(view.frame.cut(mask), np.float32)) / 255
                self._known_masks[name] = F.interpolate(pixels_HW[None, None], size, mode="area")[0]
        return self._known_masks[name]

    def _noise(self, row: Row, shape: tuple[int, ...]) -> torch.Tensor:
        noise_CHW = row.noise(shape, "noise")
        if self.noise_offset:
            noise_CHW = noise_CHW + self.noise_offset * row.noise((shape[0], 1, 1), "offset")
        return noise_CHW

    def _moments(self, views: list[View]) -> list[Tensors]:
        """The autoencoder's moments of views of one size, all in one call."""
        pixels = [bucketing.to_pixels(view.frame.cut(view.photo.open())) for view in views]
        encoded = encode_moments(torch.stack(pixels), self.tuned.model)
        means, logvars = (each.float().cpu() for each in encoded)
        for view, mean, logvar in zip(views, means, logvars, strict=True):
            if not bool(mean.isfinite().all() and logvar.isfinite().all()):
                name = view.photo.name
                raise BadInput(f"{name}: the autoencoder gives NaN for it in this precision")
        pairs = zip(means, logvars, strict=True)
        return [{"mean": mean, "logvar": logvar} for mean, logvar in pairs]

    @torch.no_grad()
    def _states(self, caption: str | None) -> Tensors:
        text = self.tuned.encode([caption])
        tensors = {"states": text.states_BLD[0]}
        if text.pooled_BP is not None:
            tensors["pooled"] = text.pooled_BP[0]
        return {name: tensor.float().cpu() for name, tensor in tensors.items()}

    def _cached_states(self, caption: str | None) -> Tensors:
        if self.cache is not None and (caption is None or caption in self._cached_captions):
            return self.cache.get(self._text_name(caption))
        if caption not in self._texts:
            if len(self._texts) == MAX_TEXTS:
                self._texts.clear()
            self._texts[caption] = self._states(caption)
        return self._texts[caption]

    def _text(self, rows: list[Row]) -> Text:
        texts = [self._cached_states(row.caption) for row in rows]
        pooled = [text["pooled"][None] if "pooled" in text else None for text in texts]
        states = [text["states"][None] for text in texts]
        return joined([Text(*each) for each in zip(states, pooled, strict=True)])

    def _text_name(self, caption: str | None) -> str:
        syntax = self.schedule.config.caption_syntax
        known = "" if syntax == "plain" else f"{syntax}\0"
        return "no text" if caption is None else f"text-{known}{caption}"
