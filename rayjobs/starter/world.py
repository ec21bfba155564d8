"""The world the starter model knows: coloured shapes on coloured grounds, drawn and captioned.

Owns the words (colours, shapes, sizes, places, patterns), the pictures they mean and the pairs that
are never drawn, so that a model trained here can show that it composes. Knows nothing of models.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {
    "red": (222, 32, 32),
    "green": (28, 148, 52),
    "blue": (30, 64, 222),
    "yellow": (250, 224, 36),
    "purple": (132, 32, 164),
    "orange": (250, 142, 20),
    "white": (248, 248, 248),
    "black": (16, 16, 18),
    "pink": (255, 164, 198),
    "cyan": (32, 220, 232),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "diamond")
LEFT_OUT = frozenset({("red", "star"), ("blue", "ring"), ("green", "heart"), ("yellow", "cross")})

# Half the figure's extent as a fraction of the picture's side.
SIZES = {"small": (0.17, 0.21), "": (0.28, 0.36), "large": (0.40, 0.44)}
# Where the figure's centre lies, as a fraction of the picture's side.
PLACES = {
    "": (0.5, 0.5),
    "on the left": (0.27, 0.5),
    "on the right": (0.73, 0.5),
    "at the top": (0.5, 0.27),
    "at the bottom": (0.5, 0.73),
}
PATTERNS = ("", "striped", "dotted")

OVERSAMPLING = 4
COLOUR_JITTER = 8
MAX_ROTATION_DEG = 14


@dataclass(frozen=True)
class Scene:
    """What one picture shows. `colour` is the figure's, `ground` the background's."""

    colour: str
    shape: str
    ground: str
    size: str = ""
    place: str = ""
    pattern: str = ""
    count: int = 1


def outline(shape: str) -> np.ndarray:
    """Corner points (N, 2) of `shape` inside the unit circle's box, y downwards."""
    if shape in ("circle", "ring"):
        return _on_circle(np.linspace(0, 2 * math.pi, 72, endpoint=False), 1.0)
    if shape == "square":
        return 0.86 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], dtype=float)
    if shape == "triangle":
        return np.array([(0, -1.0), (1.02, 0.78), (-1.02, 0.78)])
    if shape == "diamond":
        return np.array([(0, -1.06), (0.72, 0), (0, 1.06), (-0.72, 0)])
    if shape == "star":
        angles = np.arange(10) * math.pi / 5 - math.pi / 2
        return 1.1 * _on_circle(angles, np.where(np.arange(10) % 2 == 0, 1.0, 0.42))
    if shape == "cross":
        a = 0.34
        corners = [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a)]
        corners += [(a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a), (-a, -a)]
        return np.array(corners, dtype=float)
    if shape == "heart":
        t = np.linspace(0, 2 * math.pi, 96, endpoint=False)
        x = 16 * np.sin(t) ** 3
        y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        return np.stack([x / 16, -(y + 2.5) / 15], axis=1)
    raise ValueError(f"unknown shape {shape!r}; known are {', '.join(SHAPES)}")


RING_HOLE = 0.52


def figure_mask(
    shape: str, side: int, centre: tuple[float, float], radius: float, rotation_deg: float
) -> np.ndarray:
    """Coverage (side, side) in 0..1 of one figure; centre and radius are fractions of the side."""
    big = side * OVERSAMPLING
    canvas = Image.new("L", (big, big), 0)
    pen = ImageDraw.Draw(canvas)
    pen.polygon(_placed(outline(shape), big, centre, radius, rotation_deg), fill=255)
    if shape == "ring":
        hole = outline("circle") * RING_HOLE
        pen.polygon(_placed(hole, big, centre, radius, rotation_deg), fill=0)
    return np.asarray(canvas.resize((side, side), Image.Resampling.BOX), np.float32) / 255.0


def draw(scene: Scene, rng: np.random.Generator, side: int = 64) -> np.ndarray:
    """A picture (side, side, 3) uint8 of `scene`; `rng` decides shade, shift, size and turn."""
    return draw_covered(scene, rng, side)[0]


def draw_covered(
    scene: Scene, rng: np.random.Generator, side: int = 64
) -> tuple[np.ndarray, np.ndarray]:
    """The same, and how much (side, side) in 0..1 of each pixel its figures cover."""
    ground = shaded(scene.ground, rng, side)
    colour = _patterned(scene, rng, side)
    picture, whole = ground, np.zeros((side, side), np.float32)
    for centre, radius in _placements(scene, rng):
        turn = float(rng.uniform(-MAX_ROTATION_DEG, MAX_ROTATION_DEG))
        cover = figure_mask(scene.shape, side, centre, radius, turn)
        whole = np.maximum(whole, cover)
        picture = picture * (1 - cover[..., None]) + colour * cover[..., None]
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8), whole


def edges(cover: np.ndarray) -> np.ndarray:
    """Figures' outlines, white on black (side, side, 3) uint8: their pixels with a neighbour that
    is none of theirs."""
    inside = np.pad(cover > 0.5, 1)
    within = inside[2:, 1:-1] & inside[:-2, 1:-1] & inside[1:-1, 2:] & inside[1:-1, :-2]
    line = inside[1:-1, 1:-1] & ~within
    return np.repeat(np.where(line, 255, 0).astype(np.uint8)[..., None], 3, axis=-1)


def caption(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """Words for `scene`; without `rng` the plain form "a photo of a red star on a blue background".

    With `rng` the words vary as people's do: other openings, `an`, a colour left unsaid, and now
    and then a word that means nothing, so that unknown words disturb little.
    """
    opening, say_colour, say_ground, filler = "a photo of", True, True, ""
    if rng is not None:
        opening = rng.choice(
            ["a photo of", "a picture of", "a drawing of", ""], p=[0.7, 0.1, 0.1, 0.1]
        )
        say_colour, say_ground = rng.random() > 0.10, rng.random() > 0.08
        if rng.random() < 0.06:
            filler = "".join(rng.choice(list("bcdfghjklmnpqrsvwxyz"), size=int(rng.integers(2, 5))))
    noun = (
        scene.shape if scene.count == 1 else scene.shape + ("es" if scene.shape == "cross" else "s")
    )
    adjectives = [scene.size, filler, scene.colour if say_colour else "", scene.pattern]
    words = " ".join(w for w in [*adjectives, noun] if w)
    figure = f"{_article(words, rng)} {words}" if scene.count == 1 else f"two {words}"
    ground = f"on {_article(scene.ground, rng)} {scene.ground} background" if say_ground else ""
    return " ".join(w for w in [str(opening), figure, ground, scene.place] if w)


def random_scene(rng: np.random.Generator) -> Scene:
    """A scene with no left-out pair; six in ten are the plain grammar, the others add one thing."""
    while True:
        colour, ground = (str(c) for c in rng.choice(list(COLOURS), size=2, replace=False))
        shape = str(rng.choice(SHAPES))
        if (colour, shape) not in LEFT_OUT:
            break
    extra = rng.choice(["none", "size", "place", "pattern", "count"], p=[0.6, 0.1, 0.12, 0.1, 0.08])
    if extra == "size":
        return Scene(colour, shape, ground, size=str(rng.choice(["small", "large"])))
    if extra == "place":
        size = str(rng.choice(["", "small"]))
        return Scene(colour, shape, ground, size=size, place=str(rng.choice(list(PLACES)[1:])))
    if extra == "pattern":
        return Scene(colour, shape, ground, pattern=str(rng.choice(PATTERNS[1:])))
    return Scene(colour, shape, ground, count=2 if extra == "count" else 1)


def _on_circle(angles: np.ndarray, radius: float | np.ndarray) -> np.ndarray:
    return np.stack([radius * np.cos(angles), radius * np.sin(angles)], axis=1)


def _placed(
    points: np.ndarray, big: int, centre: tuple[float, float], radius: float, rotation_deg: float
) -> list[tuple[float, float]]:
    turn = math.radians(rotation_deg)
    rotate = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    return [(x, y) for x, y in points @ rotate * radius * big + np.array(centre) * big]


def _placements(scene: Scene, rng: np.random.Generator) -> list[tuple[tuple[float, float], float]]:
    low, high = SIZES[scene.size]
    if scene.count == 2:
        centres, low, high = [(0.28, 0.5), (0.72, 0.5)], 0.17, 0.20
    else:
        centres = [PLACES[scene.place]]
        if scene.place and not scene.size:
            low, high = 0.20, 0.24
    placements = []
    for x, y in centres:
        dx, dy = rng.uniform(-0.04, 0.04, size=2)
        placements.append(((x + float(dx), y + float(dy)), float(rng.uniform(low, high))))
    return placements


def shaded(name: str, rng: np.random.Generator, side: int) -> np.ndarray:
    """One colour (side, side, 3), a little off its name's value and with a faint slope of light."""
    base = np.array(COLOURS[name], np.float32) + rng.integers(-COLOUR_JITTER, COLOUR_JITTER + 1, 3)
    angle, strength = rng.uniform(0, 2 * math.pi), rng.uniform(0, 0.06)
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    light = 1 + strength * (x * math.cos(angle) + y * math.sin(angle))
    return np.clip(base[None, None, :] * light[..., None], 0, 255)


def _patterned(scene: Scene, rng: np.random.Generator, side: int) -> np.ndarray:
    """The paint (side, side, 3): plain, or with white (on white: black) stripes or dots."""
    paint = shaded(scene.colour, rng, side)
    if not scene.pattern:
        return paint
    second = shaded("black" if scene.colour == "white" else "white", rng, side)
    y, x = np.mgrid[0:side, 0:side] + rng.uniform(0, 10)
    period = side / 8
    if scene.pattern == "striped":
        wave = np.sin(2 * math.pi * (x + y) / (1.41 * period))
    else:
        wave = 1.2 * (np.sin(2 * math.pi * x / period) * np.sin(2 * math.pi * y / period)) - 0.35
    cover = np.clip(wave * 2 + 0.5, 0, 1)[..., None]
    return paint * (1 - cover) + second * cover


def _article(following: str, rng: np.random.Generator | None) -> str:
    """`a`; before a vowel, with `rng`, `an` half of the time: people write both to a model."""
    vowel = following[:1] in "aeiou"
    return "an" if vowel and rng is not None and rng.random() < 0.5 else "a"


def random_collage(rng: np.random.Generator, side: int = 64) -> np.ndarray:
    """A picture (side, side, 3) uint8 of anything: overlapping figures in any colours and patterns.

    Only the autoencoder sees these, so that it also carries pictures from outside this world, such
    as a subject that somebody wants to teach the model.
    """
    coarse = rng.uniform(0, 255, (int(rng.integers(1, 5)), int(rng.integers(1, 5)), 3))
    field = Image.fromarray(coarse.astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    picture = np.asarray(field, np.float32)
    for _ in range(int(rng.integers(1, 6))):
        colour, second = rng.uniform(0, 255, (2, 3))
        centre, radius = tuple(rng.uniform(0.1, 0.9, 2)), float(rng.uniform(0.06, 0.4))
        cover = figure_mask(str(rng.choice(SHAPES)), side, centre, radius, rng.uniform(0, 360))
        paint = np.broadcast_to(colour, picture.shape)
        if rng.random() < 0.4:
            y, x = np.mgrid[0:side, 0:side]
            angle, period = rng.uniform(0, math.pi), rng.uniform(5, 16)
            wave = np.sin(2 * math.pi * (x * math.cos(angle) + y * math.sin(angle)) / period)
            paint = np.where(wave[..., None] > 0, colour, second)
        picture = picture * (1 - cover[..., None]) + paint * cover[..., None]
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)
