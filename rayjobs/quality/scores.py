"""Scores of a picture by other models: CLIP, an aesthetic predictor, a safety classifier.

Owns what each score means and which models it takes. Knows nothing of records, jobs or storage: its
models are local folders (or names on the hub).
"""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from rayjobs.config import BadInput
from rayjobs.diffusion.files.folder import PICKLES
from rayjobs.diffusion.files.header import first_line
from rayjobs.quality.pretrained import Clip
from rayjobs.quality.safety import Safety

T = TypeVar("T")


class Scorer:
    """Scores pictures one by one, with fixed shapes, so that a score depends on nothing else."""

    def __init__(
        self,
        clip: str | None,
        aesthetic: str | None,
        safety: str | None,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        if aesthetic is not None and clip is None:
            raise BadInput("quality.aesthetic needs quality.clip, whose embedding it reads")
        self.clip = self.safety = None
        if clip is not None:
            self.clip = _for_key("quality.clip", lambda: Clip(clip, device, dtype))
        if safety is not None:
            self.safety = _for_key("quality.safety", lambda: Safety(safety, device, dtype))
        self.aesthetic = None
        if self.clip is not None and aesthetic is not None:
            width = self.clip.model.config.projection_dim
            self.aesthetic = load_predictor(aesthetic, width).to(device)

    @torch.inference_mode()
    def score(self, image: Image.Image, prompt: str) -> dict[str, float]:
        """The columns `clip_score`, `aesthetic_score` and `unsafe_score`, where there is a model.

        `clip_score` is the cosine of the angle between the picture's embedding and the prompt's,
        cut to the model's length; -1..1, for fitting pictures usually 0.2 to 0.4.
        `aesthetic_score` is what the predictor makes of the picture's embedding; LAION's gives
        about 1..10. `unsafe_score` is the probability of an unsafe label; 0..1.
        """
        image = image.convert("RGB")
        scores = {}
        if self.clip is not None:
            picture = self.clip.embed_image(image)
            scores["clip_score"] = float(picture @ self.clip.embed_text(prompt))
            if self.aesthetic is not None:
                scores["aesthetic_score"] = float(self.aesthetic(picture))
        if self.safety is not None:
            scores["unsafe_score"] = self.safety.score(image)
        return scores


def load_predictor(path: str, width: int) -> nn.Sequential:
    """An aesthetic predictor: linear layers, one after the other, over an embedding of `width`.

    The file has LAION's names (`layers.0.weight`, `layers.0.bias`, then 2, 4, 6 and 7: between them
    was dropout), the same with another prefix, or one layer (`weight` and `bias`, perhaps after a
    name). Numbers further apart tell of an activation, which the file does not name.
    """
    tensors = _tensors(path)
    names = sorted({name.rpartition(".")[0] for name in tensors}, key=_number)
    if any(_number(after) - _number(name) > 2 for name, after in pairwise(names)):
        raise _not_a_predictor(path, f"{', '.join(names)} have more between them than dropout")
    layers = []
    for name in names:
        prefix = f"{name}." if name else ""
        if not _is_linear(tensors.get(f"{prefix}weight"), tensors.get(f"{prefix}bias"), width):
            raise _not_a_predictor(path, f"{name or 'its layer'} is not linear over {width} values")
        layers.append(_linear(tensors[f"{prefix}weight"], tensors[f"{prefix}bias"]))
        width = layers[-1].out_features
    if width != 1 or len(tensors) != 2 * len(layers):
        raise _not_a_predictor(path, "it holds other things, or gives more than one value")
    return nn.Sequential(*layers).eval().requires_grad_(False)


def _tensors(path: str) -> dict[str, torch.Tensor]:
    if Path(path).suffix in PICKLES or not Path(path).is_file():
        raise _not_a_predictor(path, "it is not a .safetensors file")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise _not_a_predictor(path, first_line(error)) from None


def _number(name: str) -> int:
    """The place of a layer in its sequence, from its name."""
    last = name.rpartition(".")[2]
    return int(last) if last.isdecimal() else 0


def _is_linear(weight: torch.Tensor | None, bias: torch.Tensor | None, width: int) -> bool:
    if weight is None or bias is None:
        return False
    return weight.ndim == 2 and weight.shape[1] == width and bias.numel() == len(weight)


def _linear(weight: torch.Tensor, bias: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.load_state_dict({"weight": weight.float(), "bias": bias.float().reshape(-1)})
    return layer


def _not_a_predictor(path: str, reason: str) -> BadInput:
    return BadInput(
        f"quality.aesthetic: {path} is not an aesthetic predictor: {reason}. Expected are LAION's "
        "linear layers, saved once by safetensors.torch.save_file(torch.load(path, "
        "weights_only=True), 'predictor.safetensors')"
    )


def _for_key(key: str, load: Callable[[], T]) -> T:
    """What is loaded; a refusal names the key that is to be changed."""
    try:
        return load()
    except ValueError as error:
        raise BadInput(f"{key}: {error}") from error
