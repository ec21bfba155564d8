"""Stand-ins for image and text encoders in the starter model's world, from pixels alone.

Owns what a figure looks like wherever it is put, as a vector, and how much of a prompt is true of a
picture. No encoder can be fetched where the starter model is used; DINO and CLIP take their place
elsewhere.
"""

import re

import numpy as np
from PIL import Image

from rayjobs.starter import checker, world

CELLS = 8
CONTRAST = 25.0


def features(pictures: list[np.ndarray]) -> np.ndarray:
    """Unit vectors (N, D): the figure's colours over its own box, its outline, nothing else."""
    found = [_describe(picture) for picture in pictures]
    return np.stack([vector / max(1e-6, float(np.linalg.norm(vector))) for vector in found])


def prompt_likeness(picture: np.ndarray, prompt: str) -> float:
    """The share (0..1) of what a prompt says of shape, colour and ground that the picture shows.

    Words that this world does not know, such as an identifier, say nothing; with one the figure's
    colour is the subject's own affair. A prompt that says nothing is right.
    """
    seen, mask = checker.read(picture), checker.figure(picture, CONTRAST)
    shape = checker.nearest_shape(mask) if mask.any() else ""
    figure, _, ground = prompt.partition(" on ")
    words = re.findall(r"\w+", figure)
    known = set(world.COLOURS) | set(world.SHAPES)
    checks = [shape == word for word in words if word in world.SHAPES]
    checks += [seen.colour == word for word in words if word in world.COLOURS]
    checks += [seen.ground == word for word in re.findall(r"\w+", ground) if word in known]
    return sum(checks) / len(checks) if checks else 1.0


def _describe(picture: np.ndarray) -> np.ndarray:
    mask = checker.figure(picture, CONTRAST)
    if not mask.any():
        return np.ones(4 * CELLS * CELLS, np.float32)
    rows, columns = np.where(mask.any(1))[0], np.where(mask.any(0))[0]
    cut = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    inside = mask[cut][..., None].astype(np.float32)
    lab = checker.perceptual(picture[cut].astype(np.float32)) * inside
    planes = np.concatenate([lab / 60, inside], axis=-1)
    return np.stack([_shrunk(planes[..., i]) for i in range(planes.shape[-1])]).ravel()


def _shrunk(plane: np.ndarray) -> np.ndarray:
    small = Image.fromarray(plane.astype(np.float32)).resize((CELLS, CELLS), Image.Resampling.BOX)
    return np.asarray(small, np.float32)
