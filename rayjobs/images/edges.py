"""Control pictures drawn out of photographs, where no model is needed for it.

Owns the names of these ways and what each draws. OpenCV, of the extra `canny`, does the work.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

LOW, HIGH = 100, 200
"""Of gradients: above HIGH is an edge, above LOW what goes on from one. As ControlNets of edges are
commonly used."""


def check_preprocess(preprocess: str | None) -> None:
    """Raise ValueError where a picture cannot be drawn so on this machine."""
    if preprocess not in (None, "canny"):
        raise ValueError(f"preprocess is {preprocess!r}; it must be canny, or left out")
    if preprocess is not None and importlib.util.find_spec("cv2") is None:
        raise ValueError(
            "preprocess canny needs OpenCV, which is not installed; install it: "
            "pip install 'rayjobs[canny]'"
        )


def canny(picture: Image.Image) -> Image.Image:
    """The edges of a picture (RGB) by Canny's method, white on black (RGB)."""
    import cv2
    import numpy as np
    from PIL import Image

    grey = cv2.cvtColor(np.asarray(picture.convert("RGB")), cv2.COLOR_RGB2GRAY)
    return Image.fromarray(cv2.Canny(grey, LOW, HIGH)).convert("RGB")
