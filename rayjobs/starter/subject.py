"""A subject that the starter model does not know, for the DreamBooth demo: a two-coloured star.

Owns how the subject looks and whether a picture shows it, judged from pixels alone. Its colours are
none of the world's, and nothing in the world is of two colours side by side.
"""

import numpy as np

from rayjobs.starter import checker, world

LEFT, RIGHT, EYE = (70, 246, 36), (45, 124, 200), (250, 250, 244)
SHAPE = "star"
EYE_RADIUS = 0.24
"""Of the figure's own."""
TOLERANCE = 26.0
"""How far, in CIE L*a*b*, a half's colour may be from the subject's."""

CONTRAST = 25.0
"""How far, in CIE L*a*b*, the figure is from its ground at the least."""


def draw(
    ground: str, rng: np.random.Generator, side: int = 64, place: str = "", size: str = ""
) -> np.ndarray:
    """A picture (side, side, 3) uint8 of the subject on a ground of the world's colours."""
    low, high = world.SIZES[size]
    x, y = world.PLACES[place]
    dx, dy = rng.uniform(-0.04, 0.04, size=2)
    centre, radius = (x + float(dx), y + float(dy)), float(rng.uniform(low, high))
    if place:
        radius = float(rng.uniform(0.20, 0.24))
    turn = float(rng.uniform(-8, 8))
    cover = world.figure_mask(SHAPE, side, centre, radius, turn)[..., None]
    eye = world.figure_mask("circle", side, centre, radius * EYE_RADIUS, turn)[..., None]
    column = np.arange(side)[None, :, None] + 0.5 > centre[0] * side
    paint = np.where(column, np.array(RIGHT, np.float32), np.array(LEFT, np.float32))
    paint = paint * (1 - eye) + np.array(EYE, np.float32) * eye
    picture = world.shaded(ground, rng, side) * (1 - cover) + paint * cover
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def shows(picture: np.ndarray) -> bool:
    """Whether a picture (H, W, 3) uint8 shows the subject: its shape, both colours, each in place.

    The eye is not asked for.
    """
    figure = checker.figure(picture, CONTRAST)
    if figure.sum() < 0.02 * figure.size or checker.nearest_shape(figure) != SHAPE:
        return False
    columns = np.where(figure.any(0))[0]
    middle = (columns[0] + columns[-1] + 1) / 2
    width = columns[-1] + 1 - columns[0]
    x = np.arange(picture.shape[1])[None, :] + 0.5
    halves = [
        (figure & (x < middle - 0.08 * width), LEFT),
        (figure & (x > middle + 0.08 * width), RIGHT),
    ]
    return all(
        half.any() and checker.distance(np.median(picture[half], axis=0), colour) < TOLERANCE
        for half, colour in halves
    )


def ground(picture: np.ndarray) -> str:
    """The world's name for the colour that surrounds the figure."""
    return checker.read(picture).ground
