"""Whether a picture is safe to hand out, as an image classifier sees it.

Owns what its labels mean. Knows nothing of thresholds or of what is done about an unsafe picture.
"""

import re

import torch
from PIL import Image
from transformers import AutoModelForImageClassification

from rayjobs.quality.pretrained import load_vision_model, pixels_for

UNSAFE = frozenset(
    ("nsfw", "unsafe", "explicit", "sexual", "sexy", "porn", "hentai", "nude", "nudity")
)
SAFE = frozenset(("sfw", "safe", "normal", "neutral", "drawing", "drawings"))


class Safety:
    """An image classifier of which some labels mean that a picture is not safe.

    Labels are compared in lower case, letters and digits only. The score adds up the probabilities
    of the labels in UNSAFE; of a model that has none of these, but some in SAFE, it is what the
    latter leave of 1. Drawings are safe, `sexy` is not: a threshold can make up for caution, not
    for what was never counted.
    """

    def __init__(self, uri: str, device: str, dtype: torch.dtype):
        self.model, self.processor = load_vision_model(uri, AutoModelForImageClassification, dtype)
        self.model.to(device)
        config = self.model.config
        labels = [re.sub("[^a-z0-9]", "", config.id2label[n].lower()) for n in config.id2label]
        self.counted = [n for n, label in enumerate(labels) if label in UNSAFE]
        self.inverted = not self.counted
        if self.inverted:
            self.counted = [n for n, label in enumerate(labels) if label in SAFE]
        several = config.problem_type in (None, "single_label_classification")
        if not self.counted or not several or len(labels) < 2:
            raise ValueError(
                f"{uri} does not tell safe from unsafe; its labels are "
                f"{', '.join(config.id2label.values())}, and one of several must be one of "
                f"{', '.join(sorted(UNSAFE | SAFE))}"
            )

    @torch.inference_mode()
    def score(self, image: Image.Image) -> float:
        """The probability, 0..1, that a picture is not safe."""
        logits = self.model(pixel_values=pixels_for(self.processor, image, self.model)).logits
        share = float(logits[0].float().softmax(dim=-1)[self.counted].sum())
        return min(1.0, max(0.0, 1 - share if self.inverted else share))
