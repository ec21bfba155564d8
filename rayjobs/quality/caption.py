"""Captions: what a picture shows, in the words of an image-to-text model.

Owns how the words are chosen, so that a picture has the same ones each time. Knows nothing of
records or of prompts.
"""

import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

from rayjobs.quality.kinds import CAPTIONERS, refuse_other
from rayjobs.quality.pretrained import load_vision_model, pixels_for, pretrained

MAX_TOKENS = 64


class Captioner:
    """A model that describes pictures, one by one, by the likeliest word at each place."""

    def __init__(self, uri: str, device: str, dtype: torch.dtype):
        refuse_other(uri, pretrained(uri, AutoConfig).model_type, CAPTIONERS)
        # An encoder-decoder's words come from the patches, and many are saved without the pooler.
        self.model, self.processor = load_vision_model(
            uri, AutoModelForImageTextToText, dtype, unused="encoder.pooler."
        )
        self.tokenizer = pretrained(uri, AutoTokenizer)
        self.model.to(device)

    @torch.inference_mode()
    def caption(self, image: Image.Image) -> str:
        tokens = self.model.generate(
            pixel_values=pixels_for(self.processor, image, self.model),
            do_sample=False,
            num_beams=1,
            max_new_tokens=MAX_TOKENS,
        )
        text: str = self.tokenizer.decode(tokens[0], skip_special_tokens=True)
        return text.strip()
