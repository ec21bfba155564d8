"""Groups of what is connected by pairs, over arrays of indices: a forest of parents.

Knows nothing of pictures.
"""

import numpy as np


def join(parent: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
    """Make one group of those of a[i] and b[i], for every i; the lower root stays a root."""
    while len(a):
        a, b = root(parent, a), root(parent, b)
        apart = a != b
        a, b = a[apart], b[apart]
        np.minimum.at(parent, np.maximum(a, b), np.minimum(a, b))


def root(parent: np.ndarray, members: np.ndarray) -> np.ndarray:
    """The root above each member. Paths are halved on the way, so that chains stay short."""
    while True:
        above = parent[members]
        top = parent[above]
        if (above == top).all():
            return top
        parent[members] = top
