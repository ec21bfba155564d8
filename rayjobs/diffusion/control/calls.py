"""ControlNets called for the rows that have them, beside the UNet call of all rows.

Owns which places of a call are gathered for a ControlNet, and where what it gives is put; what a
T2I-Adapter gives is put there without a call. Legend: P
slots of the UNet call, Q those of a ControlNet's, C H W channels and size.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from rayjobs.diffusion.control.bank import ControlNet, RowControl
from rayjobs.diffusion.control.t2i import T2IAdapter
from rayjobs.diffusion.economy.deep import INTRABLOCK
from rayjobs.diffusion.modules.upload import upload

if TYPE_CHECKING:
    from rayjobs.diffusion.rows.row import Row

TAKEN = ("encoder_hidden_states", "added_cond_kwargs")
"""Of the UNet's arguments, those that ControlNets take."""
NOTHING = -0.0
"""Adds nothing to any number: with +0.0, -0.0 would become +0.0."""


class _Place(NamedTuple):
    """A row's control, and the slots of the UNet call that get it."""

    control: RowControl
    slots: tuple[int, ...]


class ControlCalls:
    """One call of each ControlNet in use; `alone`, one for each row, so that a row's bits are its
    own, however many others have the same ControlNet."""

    def __init__(self, *, alone: bool, memory_format: torch.memory_format):
        self.alone = alone
        self.memory_format = memory_format

    def residuals(
        self,
        slots: Sequence[tuple[Row, int]],
        x_PCHW: torch.Tensor,
        t_P: torch.Tensor,
        arguments: Mapping[str, Any],
    ) -> dict[str, Any]:
        """What to add to the arguments of a UNet call of these slots; nothing where no row is in a
        control's interval. The call may have more slots than are given, as padding."""
        return self._of_nets(slots, x_PCHW, t_P, arguments) | self._of_adapters(slots, len(x_PCHW))

    def _of_adapters(self, slots: Sequence[tuple[Row, int]], num_slots: int) -> dict[str, Any]:
        """Each slot's in the order of its row's controls, whatever others have."""
        of_places = [
            (place, place.control.seen())
            for place in _places(slots)
            if isinstance(place.control.net, T2IAdapter)
        ]
        if not of_places:
            return {}
        longest = max((seen for _, seen in of_places), key=len)
        added = [self._nothing(num_slots, each) for each in longest]
        for place, seen in of_places:
            index_Q = upload(torch.tensor(place.slots), seen[0].device)
            for total, each in zip(added, seen, strict=False):
                mine = (each * place.control.scale).expand(len(index_Q), *each.shape[1:])
                total.index_add_(0, index_Q, mine)
        return {INTRABLOCK: tuple(added)}

    def _of_nets(
        self,
        slots: Sequence[tuple[Row, int]],
        x_PCHW: torch.Tensor,
        t_P: torch.Tensor,
        arguments: Mapping[str, Any],
    ) -> dict[str, Any]:
        added: list[torch.Tensor] = []
        for net, places in self._calls(slots):
            index = [slot for place in places for slot in place.slots]
            index_Q = upload(torch.tensor(index), x_PCHW.device)
            taken = {name: arguments[name] for name in TAKEN if name in arguments}
            given = net.replay(
                x_PCHW.index_select(0, index_Q),
                t_P.index_select(0, index_Q),
                {**_gathered(taken, index_Q), "controlnet_cond": _seen(places)},
            )
            added = added or [self._nothing(len(x_PCHW), each) for each in given]
            scales_Q111 = _scales(places, x_PCHW.device)
            for total, each in zip(added, given, strict=True):
                total.index_add_(0, index_Q, (each * scales_Q111).to(each.dtype))
        if not added:
            return {}
        return {
            "down_block_additional_residuals": tuple(added[:-1]),
            "mid_block_additional_residual": added[-1],
        }

    def _calls(
        self, slots: Sequence[tuple[Row, int]]
    ) -> Iterator[tuple[ControlNet, Sequence[_Place]]]:
        """By ControlNet, in an order that does not depend on the rows."""
        called = (each for each in _places(slots) if isinstance(each.control.net, ControlNet))
        places = sorted(called, key=lambda place: place.control.net.sha256)
        for _, group in itertools.groupby(places, key=lambda place: place.control.net.sha256):
            of_net = list(group)
            for each in [[place] for place in of_net] if self.alone else [of_net]:
                net = each[0].control.net
                assert isinstance(net, ControlNet)
                yield net, each

    def _nothing(self, num_slots: int, like_QCHW: torch.Tensor) -> torch.Tensor:
        shape = (num_slots, *like_QCHW.shape[1:])
        empty = torch.empty(
            shape,
            dtype=like_QCHW.dtype,
            device=like_QCHW.device,
            memory_format=self.memory_format,
        )
        return empty.fill_(NOTHING)


def _places(slots: Sequence[tuple[Row, int]]) -> Iterator[_Place]:
    """The controls that are on, with their rows' slots."""
    numbered = enumerate(row for row, _ in slots)
    for row, group in itertools.groupby(numbered, key=lambda each: each[1]):
        mine = tuple(number for number, _ in group)
        for control in row.controls:
            if control.is_on(row.sampler.position):
                yield _Place(control, mine)


def _gathered(arguments: Mapping[str, Any], index_Q: torch.Tensor) -> dict[str, Any]:
    return {
        name: _gathered(value, index_Q)
        if isinstance(value, Mapping)
        else value.index_select(0, index_Q)
        for name, value in arguments.items()
    }


def _seen(places: Sequence[_Place]) -> torch.Tensor:
    return torch.cat([place.control.seen() for place in places for _ in place.slots])


def _scales(places: Sequence[_Place], device: torch.device) -> torch.Tensor:
    """float32, as diffusers multiplies: in bfloat16 a scale of 0.7 is another one."""
    scales = [place.control.scale for place in places for _ in place.slots]
    return upload(torch.tensor(scales, dtype=torch.float32).view(-1, 1, 1, 1), device)
