"""The judge is judged: on fresh renders, and on captions of other pictures."""

from itertools import pairwise

import numpy as np
import pytest

from rayjobs.starter import checker, world

pytestmark = pytest.mark.model

SEED = 20_000_003  # far from the training's


def fresh(number: int) -> tuple[world.Scene, np.ndarray]:
    rng = np.random.default_rng([SEED, number])
    colour, ground = (str(c) for c in rng.choice(list(world.COLOURS), 2, replace=False))
    scene = world.Scene(colour, str(rng.choice(world.SHAPES)), ground)
    return scene, world.draw(scene, rng)


def test_reads_fresh_renders_and_refuses_other_captions() -> None:
    scenes = [fresh(number) for number in range(400)]
    right = [checker.matches(picture, world.caption(scene)) for scene, picture in scenes]
    assert np.mean(right) >= 0.99
    accepted = [
        checker.matches(picture, world.caption(other))
        for (scene, picture), (other, _) in pairwise(scenes)
        if scene != other
    ]
    assert np.mean(accepted) <= 0.01


def test_each_wrong_word_is_noticed() -> None:
    for number in range(60):
        scene, picture = fresh(number)
        colours = [c for c in world.COLOURS if c not in (scene.colour, scene.ground)]
        shapes = [shape for shape in world.SHAPES if shape != scene.shape]
        wrong = [
            world.Scene(colours[number % 8], scene.shape, scene.ground),
            world.Scene(scene.colour, shapes[number % 7], scene.ground),
            world.Scene(scene.colour, scene.shape, colours[number % 8]),
        ]
        assert not any(checker.matches(picture, world.caption(scene)) for scene in wrong)


def test_an_empty_picture_shows_no_figure() -> None:
    assert checker.read(np.full((64, 64, 3), 250, np.uint8)) == checker.Reading("", "", "white")


def test_a_caption_outside_the_grammar_is_refused() -> None:
    with pytest.raises(ValueError, match="two red stars"):
        checker.matches(np.zeros((64, 64, 3), np.uint8), "two red stars")
