"""The UNet call: rows are laid out in slots, predicted together, and guidance is applied.

Owns the batch tensors, their padding, and classifier-free guidance. Knows nothing of samplers'
steps or of requests. Legend: P slots, C H W latent channels and size, L tokens, D width.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import rescale_noise_cfg

from rayjobs.diffusion.adapters.bank import Gathered, LoraBank
from rayjobs.diffusion.control.calls import ControlCalls
from rayjobs.diffusion.economy import deep
from rayjobs.diffusion.facts import LATENTS
from rayjobs.diffusion.ip_adapter.attention import Attention, AttentionCalls
from rayjobs.diffusion.model import Model
from rayjobs.diffusion.modules.upload import upload

if TYPE_CHECKING:
    from rayjobs.diffusion.rows.row import Row

_Asked = tuple[tuple[int, int, int, int], ...]
"""Each row's id, pass, stage and slots."""
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
        layout = torch.channels_last if model.options.channels_last else torch.contiguous_format
        self.model = model
        self.loras = loras
        self.num_slots = 2 if alone else num_slots
        self.fixed_shape = fixed_shape
        self.alone = alone
        self._controls = ControlCalls(alone=fixed_shape, memory_format=layout)
        self._attention = AttentionCalls(model.unet)
        self._layout_of_memory = layout
        self._conditions: dict[tuple[bool, bool], tuple[_Asked, list[dict[str, Any]]]] = {}

    def predict_noise(self, rows: Sequence[Row]) -> list[torch.Tensor]:
        """The guided prediction (1, C, H, W) for each row, at each row's own timestep."""
        guided: dict[Row, torch.Tensor] = {}
        for kind in sorted({self._kind(row) for row in rows}):
            group = [row for row in rows if self._kind(row) == kind]
            guided |= self._predict_alike(sorted(group, key=lambda row: row.num_chunks))
        return [guided[row] for row in rows]

    def _kind(self, row: Row) -> tuple[bool, bool]:
        """Rows of one kind share calls. Compiled calls are for rows without adapters and controls,
        which others would else keep from theirs."""
        is_extra = self.loras.differs(row.loras) or bool(row.controls or row.ip_adapters)
        return row.reuses, self.model.compiled is not None and is_extra

    def _predict_alike(self, rows: Sequence[Row]) -> dict[Row, torch.Tensor]:
        """For rows that all reuse what the deep blocks gave, or none of which does."""
        reuses, keeps = rows[0].reuses, any(row.call.keeps for row in rows)
        slots = [(row, slot) for row in rows for slot in row.slots]
        x_PCHW = torch.cat([x for row in rows for x in [row.scaled_latents()] * row.num_slots])
        t_P = torch.stack([row.sampler.timestep.float() for row, _ in slots])
        t_P = upload(t_P, self.model.device)
        taken = torch.cat([row.deep[slot] for row, slot in slots]) if reuses else None
        outputs, first = [], 0
        for condition in self._all_conditions(rows):
            now = slice(first, first + condition["num_slots"])
            deep_PCHW = None if taken is None else taken[now]
            call = slots[now], x_PCHW[now], t_P[now], condition
            noise_PCHW, deep_PCHW = self._call(*call, deep_PCHW, keeps)
            outputs.append(noise_PCHW)
            if keeps and deep_PCHW is not None:
                _keep(slots[now], deep_PCHW)
            first = now.stop
        return dict(zip(rows, self._guide(rows, torch.cat(outputs)), strict=True))

    def forget(self) -> None:
        """Give back what calls of the same rows would use again."""
        self._conditions.clear()

    def _call(
        self,
        slots: Sequence[tuple[Row, int]],
        x_PCHW: torch.Tensor,
        t_P: torch.Tensor,
        condition: dict[str, Any],
        deep_PCHW: torch.Tensor | None,
        keeps: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One UNet call, padded by repeating its last slot; the padding is cut off again.

        It reuses `deep_PCHW`, where that is given, else it `keeps` what the deep blocks give, or
        neither.
        """
        num, model = len(x_PCHW), self.model
        arguments, padding = condition["arguments"], condition["size"] - num
        loras: Gathered = condition["loras"]
        attention: Attention = condition["attention"]
        x_PCHW, t_P = _padded(x_PCHW, padding).to(model.dtype), _padded(t_P, padding)
        latents_PCHW = x_PCHW[:, :LATENTS]
        arguments = {**arguments, **self._controls.residuals(slots, latents_PCHW, t_P, arguments)}
        way, replay = deep.whole, "replay"
        if deep_PCHW is not None:
            # In one order of memory, which padding would change, and with it bits.
            padded = _padded(deep_PCHW, padding)
            padded = padded.contiguous(memory_format=self._layout_of_memory)
            arguments = {**arguments, deep.DEEP: padded}
            way, replay = deep.reusing, "replay_reusing"
        elif keeps:
            way, replay = deep.keeping, "replay_keeping"
        # Those of rows with controls are not compiled outside their intervals either: bits would
        # depend on whether another row is inside its own.
        is_plain = not any(row.controls or row.ip_adapters for row, _ in slots) and not loras.uses
        compiled = model.compiled if is_plain else None
        beside = attention.beside(loras.beside)
        with loras.applied(), attention.applied():
            if compiled is not None and compiled.takes(way, x_PCHW, arguments):
                given = compiled(way, x_PCHW, t_P, arguments)
            elif beside is None:
                given = way(model.unet, x_PCHW, t_P, arguments)
            else:
                given = getattr(model, replay)(x_PCHW, t_P, arguments, beside)
        if not keeps:
            return given[:num], None
        noise_PCHW, deep_PCHW = given
        return noise_PCHW[:num], deep_PCHW

    def _all_conditions(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """What the calls of these rows are conditioned on; kept while they ask for the same."""
        asked = tuple((row.id, row.number, row.stage, row.num_slots) for row in rows)
        kind = self._kind(rows[0])
        before, conditions = self._conditions.get(kind, ((), []))
        if asked != before:
            self._conditions.pop(kind, None)  # before others take memory, too
            conditions = [self._condition(slots) for slots in self._layout(rows)]
            self._conditions[kind] = asked, conditions
        return conditions

    def _layout(self, rows: Sequence[Row]) -> list[list[tuple[Row, int]]]:
        """Who has which slot of which call."""
        by_row = [[(row, slot) for slot in row.slots] for row in rows]
        if self.alone:
            return by_row
        calls = []
        # A text said twice gives other last bits than said once.
        for group in _of_like_length(by_row, 1 if self.fixed_shape else MAX_COMMON_CHUNKS):
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
            size_ids = torch.tensor(
                [row.size_ids[slot] for row, slot in slots], dtype=torch.float32
            )
            pooled = [e.pooled_1D for e in embeddings if e.pooled_1D is not None]
            arguments["added_cond_kwargs"] = {
                "text_embeds": torch.cat(pooled),
                "time_ids": upload(size_ids, self.model.device),
            }
        if self.model.unet.config.time_cond_proj_dim is not None:
            arguments["timestep_cond"] = self._guidance_embedding([row for row, _ in slots])
        loras = self.loras.gather([row.loras for row, _ in slots], ("unet",))
        attention = self._attention.gather(slots[:num_slots])
        sizes = {"num_slots": num_slots, "size": len(slots)}
        return {"arguments": arguments, "loras": loras, "attention": attention, **sizes}

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
                if row.settings.guidance_rescale > 0:
                    noise = rescale_noise_cfg(noise, text, row.settings.guidance_rescale)
            guided.append(noise)
            slot += row.num_slots
        return guided


def _keep(slots: Sequence[tuple[Row, int]], deep_PCHW: torch.Tensor) -> None:
    """What rows will reuse, copied: what the call gave for others need not stay."""
    for number, (row, slot) in enumerate(slots):
        if row.call.keeps:
            row.deep[slot] = deep_PCHW[number : number + 1].clone()


def _padded(tensor: torch.Tensor, padding: int) -> torch.Tensor:
    """With its last slot again as often."""
    more = tensor[-1:].expand(padding, *tensor.shape[1:])
    return torch.cat([tensor, more]) if padding else tensor


def _of_like_length(
    by_row: list[list[tuple[Row, int]]], most: int
) -> list[list[list[tuple[Row, int]]]]:
    """Rows, ordered by the length of their texts, as far as these have a length in common of at
    most so many chunks, or all one."""
    lengths = {slots[0][0].num_chunks for slots in by_row}
    if math.lcm(*lengths) <= most or len(lengths) < 2:
        return [by_row]
    groups = itertools.groupby(by_row, key=lambda slots: slots[0][0].num_chunks)
    return [list(group) for _, group in groups]


def _same_length(texts: list[torch.Tensor]) -> torch.Tensor:
    """Texts (1, L, D) as one batch: attention to a text said twice is attention to it once."""
    length = math.lcm(*(text.shape[1] for text in texts))
    return torch.cat([text.repeat(1, length // text.shape[1], 1) for text in texts])
