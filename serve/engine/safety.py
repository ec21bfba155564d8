"""Checks each finished image with a safety classifier, where one is configured.

Owns the threshold. Which of a classifier's labels are unsafe is decided in `rayjobs.quality`.
"""

from PIL import Image

from rayjobs import storage
from rayjobs.config import BadInput
from serve.config import SafetyConfig


class Safety:
    """Raises BadInput when the classifier cannot be loaded or has no unsafe label."""

    def __init__(self, uri: str, threshold: float, device: str = "cpu"):
        import torch

        from rayjobs.quality import safety  # seconds, which a server without a classifier saves

        self.threshold = threshold
        try:
            self._classifier = safety.Safety(storage.to_local(uri), device, torch.float32)
        except ValueError as error:
            raise BadInput(f"safety.uri: {error}") from None

    def allows(self, image: Image.Image) -> bool:
        return self._classifier.score(image) <= self.threshold


def build(config: SafetyConfig) -> Safety | None:
    if config.uri is None:
        return None
    import torch

    return Safety(config.uri, config.threshold, "cuda" if torch.cuda.is_available() else "cpu")
