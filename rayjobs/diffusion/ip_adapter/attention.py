"""The attention to pictures in a UNet call, for the slots whose rows have some.

Owns what is added to the attention to texts, before the layer that ends both; the other slots keep
their bits, and calls without pictures their layers. Legend: P slots of a call, Q those that attend
to a picture of T tokens, L latent pixels, D width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from rayjobs.diffusion.ip_adapter.bank import Seen
from rayjobs.diffusion.ip_adapter.files import cross_attentions
from rayjobs.diffusion.modules.replay import Beside
from rayjobs.diffusion.modules.upload import upload

if TYPE_CHECKING:
    from rayjobs.diffusion.rows.row import Row

Group = dict[str, torch.Tensor]
"""Slots that attend to one picture each, of as many tokens: their numbers and scales, and keys and
values (Q, T, D) for each layer."""
Place = tuple[int, float, Seen]
"""A slot, and the scale and the picture that it has."""


class Attention:
    """What a call attends to beside texts, ready for as many calls as have the same rows."""

    def __init__(self, layers: Sequence[Any] = (), groups: Sequence[Group] = ()):
        self._layers = layers
        self._groups = groups

    def __bool__(self) -> bool:
        return bool(self._groups)

    @contextlib.contextmanager
    def applied(self) -> Generator[None]:
        """Within this context, calls of the UNet attend to the pictures."""
        with contextlib.ExitStack() as stack:
            for number, layer in enumerate(self._layers if self else ()):
                for handle in _hooked(layer, self._groups, number):
                    stack.callback(handle.remove)
            yield

    def beside(self, others: Beside | None) -> Beside | None:
        """The tensors as inputs of a recording, beside other ones."""
        if others is None or not self:
            return others
        places = tuple((group, name) for group in self._groups for name in group)
        names = f"{others.names} {len(self._groups)} groups of pictures"
        shapes = tuple(group["0 k"].shape[:2] for group in self._groups)
        return Beside((*others.places, *places), names, (others.shapes, shapes))


class AttentionCalls:
    """Gathers the pictures of calls of one UNet."""

    def __init__(self, unet: Any):
        self._layers = cross_attentions(unet)

    def gather(self, slots: Sequence[tuple[Row, int]]) -> Attention:
        """What slots attend to: a row's first picture, then its second, whatever others have."""
        members: dict[tuple[int, int], list[Place]] = {}
        for slot, (row, text) in enumerate(slots):
            in_use = [each for each in row.ip_adapters if each.scale]
            for nth, each in enumerate(in_use):
                seen = each.seen(negative=text < len(row.said) - 1)
                place = slot, each.scale, seen
                members.setdefault((nth, seen[0][0].shape[1]), []).append(place)
        return Attention(self._layers, [_group(members[key]) for key in sorted(members)])


def _group(places: Sequence[Place]) -> Group:
    slots, scales, seen = zip(*places, strict=True)
    device = seen[0][0][0].device
    group = {
        "slots": upload(torch.tensor(slots), device),
        # float32: in bfloat16 a scale of 0.7 is another one.
        "scales": upload(torch.tensor(scales, dtype=torch.float32).view(-1, 1, 1), device),
    }
    for number in range(len(seen[0])):
        group[f"{number} k"] = torch.cat([of_slot[number][0] for of_slot in seen])
        group[f"{number} v"] = torch.cat([of_slot[number][1] for of_slot in seen])
    return group


def _hooked(layer: Any, groups: Sequence[Group], number: int) -> list[Any]:
    """Hooks that take a layer's queries, and add to what its last part is given."""
    queries: list[torch.Tensor] = []

    def keep(module: Any, args: Any, query_PLD: torch.Tensor) -> None:
        queries[:] = [query_PLD]

    def attend(module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        x_PLD = args[0]
        for group in groups:
            x_PLD = _added(x_PLD, queries[0], layer.heads, group, number)
        queries.clear()
        return (x_PLD, *args[1:])

    return [
        layer.to_q.register_forward_hook(keep),
        layer.to_out[0].register_forward_pre_hook(attend),
    ]


def _added(
    x_PLD: torch.Tensor, query_PLD: torch.Tensor, heads: int, group: Group, number: int
) -> torch.Tensor:
    query_QLD = query_PLD.index_select(0, group["slots"])
    parts = (query_QLD, group[f"{number} k"], group[f"{number} v"])
    by_head = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in parts)
    seen_QLD = F.scaled_dot_product_attention(*by_head).transpose(1, 2).flatten(2)
    added_QLD = (seen_QLD * group["scales"]).to(x_PLD.dtype)
    return x_PLD.index_add(0, group["slots"], added_QLD)
