"""Previews of unfinished images, from the device to who asked for them.

Owns when they are sent: as soon as their latents have come, since a step that waits for them leaves
the device idle. Knows nothing of steps or of how a preview is drawn.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

from rayjobs.diffusion.vae.preview import Preview
from serve.engine.request_state import RequestState
from serve.images import to_pixels
from serve.protocol import Partial


@dataclass(frozen=True)
class _Begun:
    state: RequestState
    row_id: int
    image: int
    index: int
    preview: Preview


class Previews:
    """Those that were begun and are not sent yet, oldest first."""

    def __init__(self, send: Callable[[RequestState, Partial], None]):
        self._send = send
        self._begun: list[_Begun] = []

    def begin(self, state: RequestState, row_id: int, done: int) -> None:
        """Where one is due after `done` steps of a row."""
        steps = state.preview_steps[row_id]
        if not steps or done < steps[0]:
            return
        index = state.num_partials - len(steps)
        steps.pop(0)
        with contextlib.suppress(RuntimeError):  # previews are optional
            preview = state.loaded.engine.begin_preview(row_id)
            if preview is not None:
                self._begun.append(_Begun(state, row_id, state.images[row_id], index, preview))

    def send(self) -> None:
        """Those that have come, but none of an image that is made or not wanted any more."""
        begun, self._begun = self._begun, []
        for each in begun:
            if each.state.over or each.row_id not in each.state.images:
                continue
            if not each.preview.is_ready:
                self._begun.append(each)
                continue
            with contextlib.suppress(RuntimeError):
                picture = to_pixels(each.preview.draw())
                self._send(each.state, Partial(each.image, each.index, picture))
