"""Encoders and classifiers of Hugging Face's, loaded without running any code of theirs.

Owns the safety rules (no pickles, no remote code, no missing weights) and CLIP. Knows nothing of
what a score means. Raises ValueError naming the model and the reason.
"""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, CLIPModel
from transformers.utils import logging as transformers_logging

from rayjobs.diffusion.files.folder import refuse_pickles
from rayjobs.diffusion.files.header import first_line
from rayjobs.quality.kinds import CLIPS, refuse_other

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()


class Clip:
    """A CLIP model with its tokenizer and image processor; embeddings have length 1."""

    def __init__(self, uri: str, device: str, dtype: torch.dtype = torch.float32):
        refuse_other(uri, pretrained(uri, AutoConfig).model_type, CLIPS)
        self.model, self.processor = load_vision_model(uri, CLIPModel, dtype)
        self.tokenizer = pretrained(uri, AutoTokenizer)
        self.model.to(device)

    @property
    def logit_scale(self) -> torch.Tensor:
        """What training multiplied the cosines by."""
        return self.model.logit_scale.detach().float().exp()

    @torch.inference_mode()
    def embed_image(self, image: Image.Image) -> torch.Tensor:
        pixels = pixels_for(self.processor, image, self.model)
        return _unit(self.model.get_image_features(pixel_values=pixels).pooler_output)

    @torch.inference_mode()
    def embed_text(self, text: str) -> torch.Tensor:
        """Of a text that is cut to the model's length."""
        tokens = self.tokenizer(
            text,
            padding="max_length",
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.model.device)
        features = self.model.get_text_features(tokens.input_ids, tokens.attention_mask)
        return _unit(features.pooler_output)


def load_vision_model(
    uri: str, kind: Any, dtype: torch.dtype, unused: str = " "
) -> tuple[Any, Any]:
    """A model with all of its weights, in evaluation mode, and its image processor.

    Those whose names begin with `unused` may lack.
    """
    refuse_pickles([Path(uri)])
    model, info = pretrained(uri, kind, dtype=dtype, use_safetensors=True, output_loading_info=True)
    if missing := sorted(key for key in info["missing_keys"] if not key.startswith(unused)):
        raise ValueError(
            f"{uri} lacks {len(missing)} weights of a {type(model).__name__}, such as "
            f"{missing[0]}; name a model that was trained as one"
        )
    return model.eval(), load_processor(uri)


def load_processor(uri: str) -> Any:
    # Pillow's arithmetic, whether torchvision is installed or not: the score must not depend on it.
    return pretrained(uri, AutoImageProcessor, backend="pil")


def pretrained(uri: str, kind: Any, **options: Any) -> Any:
    """`from_pretrained`, with a ValueError that names the model and the reason."""
    try:
        return kind.from_pretrained(uri, trust_remote_code=False, **options)
    except Exception as error:  # transformers raises nearly anything for a damaged folder
        raise ValueError(f"{uri} cannot be loaded: {first_line(error)}") from error


def pixels_for(processor: Any, image: Image.Image, model: Any) -> torch.Tensor:
    values = processor(images=image.convert("RGB"), return_tensors="pt").pixel_values
    return values.to(model.device, model.dtype)


def _unit(features: torch.Tensor) -> torch.Tensor:
    return nn.functional.normalize(features[0].float(), dim=-1)
