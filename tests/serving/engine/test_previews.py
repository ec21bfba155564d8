"""When a preview of an unfinished image is sent. No image is drawn."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from PIL import Image

from serve.engine.previews import Previews


@dataclass
class Sketch:
    is_ready: bool = False

    def draw(self) -> Image.Image:
        assert self.is_ready, "a step would wait for it"
        return Image.new("RGB", (1, 1))


@dataclass
class State:
    """Of a request for two images, of rows 7 and 8."""

    loaded: Any
    preview_steps: dict[int, list[int]] = field(default_factory=lambda: {7: [2, 4], 8: [3]})
    images: dict[int, int] = field(default_factory=lambda: {7: 0, 8: 1})
    num_partials: int = 2
    over: bool = False


def test_a_preview_is_sent_when_it_has_come() -> None:
    begun: list[Sketch] = []
    sent: list[tuple[int, int]] = []

    def begin_preview(row_id: int) -> Sketch:
        begun.append(Sketch())
        return begun[-1]

    engine = SimpleNamespace(begin_preview=begin_preview)
    state: Any = State(SimpleNamespace(engine=engine))
    previews = Previews(lambda _, partial: sent.append((partial.image, partial.index)))
    for done in (1, 2, 3):
        for row_id in (7, 8):
            previews.begin(state, row_id, done)
        previews.send()
    assert (len(begun), sent) == (2, [])
    begun[1].is_ready = True
    previews.send()
    assert sent == [(1, 1)]
    begun[0].is_ready = True
    del state.images[7]  # its picture is made
    previews.send()
    previews.begin(state, 8, 4)
    assert (len(begun), sent) == (2, [(1, 1)])
