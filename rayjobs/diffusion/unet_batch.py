"""The UNet call: rows are laid out in slots, predicted together, and guidance is applied.

Owns the batch tensors, their padding, and classifier-free guidance. Knows nothing of samplers'
steps or of requests. Legend: P slots, C H W latent channels and size, L tokens, D width.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import rescale_noise_cfg
from torch.nn.attention import SDPBackend, sdpa_kernel

from rayjobs.diffusion.adapters.bank import Gathered, LoraBank
from rayjobs.diffusion.model import Model
from rayjobs.diffusion.modules.upload import upload

if TYPE_CHECKING:
    from rayjobs.diffusion.row import Row

KERNELS = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
MAX_COMMON_CHUNKS = 12
"""Texts of different lengths share a call where a common multiple of these is no longer."""


class UNetBatch:
    """Lays rows out in calls of `num_slots`.

    With `fixed_shape` the last call is padded to that size. A row `alone` has a call to itself, of
    as many slots as it needs: on CUDA cuDNN's convolutions give the same numbers other bits in
    another slot of a call (measured on an H200: calls of 4, 8 and 16), so that there a fixed
    number of slots is not enough for a row's bits to be its own.
    """

    def __init__(
        self,
        model: Model,
        loras: LoraBank,
        num_slots: int,
        *,
        fixed_shape: bool,
        alone: bool = False,
    ):
        self.model = model
        self.loras = loras
        self.num_slots = 2 if alone else num_slots
        self.fixed_shape = fixed_shape
        self.alone = alone
        self._conditions_of: tuple[tuple[int, int], ...] = ()
        self._conditions: list[dict[str, Any]] = []

    def predict_noise(self, rows: Sequence[Row]) -> list[torch.Tensor]:
        """The guided prediction (1, C, H, W) for each row, at each row's own timestep."""
        asked, rows = rows, sorted(rows, key=lambda row: row.num_chunks)
        inputs, timesteps = [], []
        for row in rows:
            inputs += [row.scaled_latents()] * row.num_slots
            timesteps += [row.sampler.timestep] * row.num_slots
        x_PCHW = torch.cat(inputs)
        t_P = upload(torch.stack([t.float() for t in timesteps]), self.model.device)
        outputs, first = [], 0
        for condition in self._all_conditions(rows):
            end = first + condition["num_slots"]
            outputs.append(self._call(x_PCHW[first:end], t_P[first:end], condition))
            first = end
        guided = dict(zip(rows, self._guide(rows, torch.cat(outputs)), strict=True))
        return [guided[row] for row in asked]

    def forget(self) -> None:
        """Give back what calls of the same rows would use again."""
        self._conditions_of, self._conditions = (), []

    def _call(
        self, x_PCHW: torch.Tensor, t_P: torch.Tensor, condition: dict[str, Any]
    ) -> torch.Tensor:
        """One UNet call, padded by repeating its last slot; the padding is cut off again."""
        num = len(x_PCHW)
        loras: Gathered = condition["loras"]
        padding = condition["size"] - num
        if padding:
            x_PCHW = torch.cat([x_PCHW, x_PCHW[-1:].expand(padding, -1, -1, -1)])
            t_P = torch.cat([t_P, t_P[-1:].expand(padding)])
        kernel = KERNELS.get(self.model.options.attention)
        x_PCHW, arguments = x_PCHW.to(self.model.dtype), condition["arguments"]
        with loras.applied(), sdpa_kernel(kernel) if kernel else contextlib.nullcontext():
            if loras.beside is None or self.model.options.compile != "no":
                noise_PCHW = self.model.unet(x_PCHW, t_P, return_dict=False, **arguments)[0]
            else:
                noise_PCHW = self.model.replay(x_PCHW, t_P, arguments, loras.beside)
        return noise_PCHW[:num]

    def _all_conditions(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """What the calls of these rows are conditioned on; kept while the rows stay the same."""
        ids = tuple((row.id, row.stage) for row in rows)
        if ids != self._conditions_of:
            self.forget()
            self._conditions = [self._condition(slots) for slots in self._layout(rows)]
            self._conditions_of = ids
        return self._conditions

    def _layout(self, rows: Sequence[Row]) -> list[list[tuple[Row, int]]]:
        """Who has which slot of which call."""
        by_row = [[(row, slot) for slot in range(row.num_slots)] for row in rows]
        if self.alone:
            return by_row
        calls = []
        for group in _of_like_length(by_row):
            slots = list(itertools.chain.from_iterable(group))
            size = self.num_slots
            calls += [slots[first : first + size] for first in range(0, len(slots), size)]
        return calls

    def _condition(self, slots: list[tuple[Row, int]]) -> dict[str, Any]:
        num_slots = len(slots)
        if self.fixed_shape and not self.alone:
            slots = slots + [slots[-1]] * (self.num_slots - len(slots))
        embeddings = [row.embedding(slot) for row, slot in slots]
        arguments: dict[str, Any] = {
            "encoder_hidden_states": _same_length([e.text_1LD for e in embeddings])
        }
        if self.model.family == "sdxl":
            # float32 up to the sinusoid: bfloat16 would round 1023 to 1024.
            size_ids = torch.tensor([row.size_ids for row, _ in slots], dtype=torch.float32)
            pooled = [e.pooled_1D for e in embeddings if e.pooled_1D is not None]
            arguments["added_cond_kwargs"] = {
                "text_embeds": torch.cat(pooled),
                "time_ids": upload(size_ids, self.model.device),
            }
        if self.model.unet.config.time_cond_proj_dim is not None:
            arguments["timestep_cond"] = self._guidance_embedding([row for row, _ in slots])
        loras = self.loras.gather([row.loras for row, _ in slots], ("unet",))
        sizes = {"num_slots": num_slots, "size": len(slots)}
        return {"arguments": arguments, "loras": loras, **sizes}

    def _guidance_embedding(self, rows: list[Row]) -> torch.Tensor:
        """Guidance as an input, for UNets distilled with it (LCM)."""
        scales = torch.tensor([row.guidance_scale - 1 for row in rows])
        pipeline: Any = StableDiffusionXLPipeline
        embedding = pipeline.get_guidance_scale_embedding(
            None, scales, embedding_dim=self.model.unet.config.time_cond_proj_dim
        )
        return upload(embedding.to(self.model.dtype), self.model.device)

    def _guide(self, rows: Sequence[Row], noise_PCHW: torch.Tensor) -> list[torch.Tensor]:
        """Classifier-free guidance, row by row where there are two slots."""
        guided, slot = [], 0
        for row in rows:
            noise = noise_PCHW[slot : slot + 1]
            if row.num_slots == 2:
                text = noise_PCHW[slot + 1 : slot + 2]
                noise = noise + row.guidance_scale * (text - noise)
                if row.request.guidance_rescale > 0:
                    noise = rescale_noise_cfg(noise, text, row.request.guidance_rescale)
            guided.append(noise)
            slot += row.num_slots
        return guided


def _of_like_length(by_row: list[list[tuple[Row, int]]]) -> list[list[list[tuple[Row, int]]]]:
    """Rows, ordered by the length of their texts, as far as these have a length in common."""
    lengths = {slots[0][0].num_chunks for slots in by_row}
    if math.lcm(*lengths) <= MAX_COMMON_CHUNKS or len(lengths) < 2:
        return [by_row]
    groups = itertools.groupby(by_row, key=lambda slots: slots[0][0].num_chunks)
    return [list(group) for _, group in groups]


def _same_length(texts: list[torch.Tensor]) -> torch.Tensor:
    """Texts (1, L, D) as one batch: attention to a text said twice is attention to it once."""
    length = math.lcm(*(text.shape[1] for text in texts))
    return torch.cat([text.repeat(1, length // text.shape[1], 1) for text in texts])
