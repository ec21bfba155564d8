"""A subject that the starter model does not know, for the DreamBooth demo: a star with an eye.

Owns how the subject looks and whether a picture shows it, judged from pixels alone. Its colour is
none of the world's, and nothing in the world has anything inside.
"""

import numpy as np

from rayjobs.starter import checker, world

BODY, EYE = (70, 246, 36), (250, 250, 244)
SHAPE = "star"
EYE_RADIUS = 0.27
"""Of the figure's own."""
TOLERANCE = 28.0
"""How far, in CIE L*a*b*, the body's colour may be from the subject's; the world's are 57 away."""
CONTRAST = 25.0
"""How far, in CIE L*a*b*, the eye is from the body, and the figure from its ground, at least."""


def draw(
    ground: str, rng: np.random.Generator, side: int = 64, place: str = "", size: str = ""
) -> np.ndarray:
    """A picture (side, side, 3) uint8 of the subject on a ground of the world's colours."""
    low, high = (0.20, 0.24) if place else world.SIZES[size]
    (x, y), (dx, dy) = world.PLACES[place], rng.uniform(-0.04, 0.04, size=2)
    centre, radius = (x + float(dx), y + float(dy)), float(rng.uniform(low, high))
    turn = float(rng.uniform(-8, 8))
    cover = world.figure_mask(SHAPE, side, centre, radius, turn)[..., None]
    eye = world.figure_mask("circle", side, centre, radius * EYE_RADIUS, turn)[..., None]
    paint = np.array(BODY, np.float32) * (1 - eye) + np.array(EYE, np.float32) * eye
    picture = world.shaded(ground, rng, side) * (1 - cover) + paint * cover
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def shows(picture: np.ndarray) -> bool:
    """Whether a picture (H, W, 3) uint8 shows the subject: its shape, its colour, its eye."""
    figure = checker.figure(picture, CONTRAST)
    if figure.sum() < 0.02 * figure.size:
        return False
    rows, columns = np.where(figure.any(1))[0], np.where(figure.any(0))[0]
    # The eye may be taken for ground where that is white; the star's centre is there all the same.
    y, x = 0.45 * rows[0] + 0.55 * rows[-1], (columns[0] + columns[-1]) / 2
    reach = (columns[-1] - columns[0] + 1) / 2
    away = np.hypot(*(np.indices(figure.shape) - np.array([y, x])[:, None, None])) / reach
    body = figure & (away > 2 * EYE_RADIUS * 0.75)
    centre = np.median(picture[away < EYE_RADIUS / 2], axis=0)
    return (
        checker.nearest_shape(figure | (away < EYE_RADIUS)) == SHAPE
        and checker.distance(np.median(picture[body], axis=0), BODY) < TOLERANCE
        and checker.distance(centre, BODY) > CONTRAST
    )


def ground(picture: np.ndarray) -> str:
    """The world's name for the colour that surrounds the figure."""
    return checker.read(picture).ground
