"""The word of a safety checker on each picture, where one is configured.

Owns the threshold. What a classifier's labels mean is the engine's business.
"""

import torch
from PIL import Image

from rayjobs import storage
from rayjobs.config import BadInput
from rayjobs.quality import safety
from serve.config import SafetyConfig


class Safety:
    """Raises BadInput when the classifier cannot be loaded or does not tell safe from unsafe."""

    def __init__(self, uri: str, threshold: float, device: str = "cpu"):
        self.threshold = threshold
        try:
            self._classifier = safety.Safety(storage.to_local(uri), device, torch.float32)
        except ValueError as error:
            raise BadInput(f"safety.uri: {error}") from None

    def allows(self, image: Image.Image) -> bool:
        return self._classifier.score(image) <= self.threshold


def build(config: SafetyConfig) -> Safety | None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return None if config.uri is None else Safety(config.uri, config.threshold, device)
