"""What other models say of a picture: CLIPs, an aesthetic predictor, a classifier, a captioner.

Owns what each score means and which models it takes. Knows nothing of records, jobs or storage: its
models are local folders (or names on the hub).
"""

from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from rayjobs.config import BadInput
from rayjobs.diffusion.files.folder import PICKLES
from rayjobs.diffusion.files.header import first_line
from rayjobs.quality.caption import Captioner
from rayjobs.quality.pretrained import Clip
from rayjobs.quality.safety import Safety

T = TypeVar("T")


class Asked(NamedTuple):
    """The keys of `quality` that ask for a column, with models as local paths or hub ids."""

    clip: str | None = None
    aesthetic: str | None = None
    safety: str | None = None
    pick: str | None = None
    hps: str | None = None
    embedding: bool = False
    caption: str | None = None


class Scorer:
    """Scores pictures one by one, with fixed shapes, so that a score depends on nothing else."""

    def __init__(self, asked: Asked, device: str = "cpu", dtype: torch.dtype = torch.float32):
        if asked.clip is None and (asked.aesthetic is not None or asked.embedding):
            key = "embedding" if asked.aesthetic is None else "aesthetic"
            raise BadInput(f"quality.{key} needs quality.clip, whose embedding it takes")
        names = {"clip": asked.clip, "pick": asked.pick, "hps": asked.hps}
        self.clips = load_clips(names, device, dtype)
        self.clip = self.clips.get("clip")
        self.embedding = asked.embedding
        self.safety = self.captioner = self.aesthetic = None
        if (safety := asked.safety) is not None:
            self.safety = _for_key("quality.safety", lambda: Safety(safety, device, dtype))
        if (caption := asked.caption) is not None:
            self.captioner = _for_key("quality.caption", lambda: Captioner(caption, device, dtype))
        if self.clip is not None and asked.aesthetic is not None:
            width = self.clip.model.config.projection_dim
            self.aesthetic = load_predictor(asked.aesthetic, width).to(device)

    @torch.inference_mode()
    def score(self, image: Image.Image, prompt: str) -> dict[str, Any]:
        """The columns that SCORES names, where there is a model.

        `clip_score` is the cosine of the angle between the picture's embedding and the prompt's,
        cut to the model's length; -1..1, for fitting pictures usually 0.2 to 0.4.
        `aesthetic_score` is what the predictor makes of the picture's embedding; LAION's gives
        about 1..10. `unsafe_score` is the probability of an unsafe label; 0..1. `hps_score` is the
        cosine as HPSv2's own code gives it, and `pick_score` as PickScore's does, times the model's
        logit scale: about 0.2..0.3 and 18..24.
        """
        image = image.convert("RGB")
        scores = self._clip_scores(image, prompt)
        if self.safety is not None:
            scores["unsafe_score"] = self.safety.score(image)
        if self.captioner is not None:
            scores["caption"] = self.captioner.caption(image)
        return scores

    def _clip_scores(self, image: Image.Image, prompt: str) -> dict[str, Any]:
        scores: dict[str, Any] = {}
        embeddings = {clip: clip.embed_image(image) for clip in self.clips.values()}
        cosines = {clip: each @ clip.embed_text(prompt) for clip, each in embeddings.items()}
        if self.clip is not None:
            scores["clip_score"] = float(cosines[self.clip])
            if self.aesthetic is not None:
                scores["aesthetic_score"] = float(self.aesthetic(embeddings[self.clip]))
            if self.embedding:
                scores["embedding"] = embeddings[self.clip].tolist()
        if pick := self.clips.get("pick"):
            scores["pick_score"] = float(pick.logit_scale * cosines[pick])
        if hps := self.clips.get("hps"):
            scores["hps_score"] = float(cosines[hps])
        return scores


def load_clips(uris: Mapping[str, str | None], device: str, dtype: torch.dtype) -> dict[str, Clip]:
    """The models by key; one that several keys name is loaded once."""
    clips: dict[str, Clip] = {}
    loaded: dict[str, Clip] = {}
    for key, uri in uris.items():
        if uri is not None:
            if uri not in loaded:
                loaded[uri] = _for_key(f"quality.{key}", partial(Clip, uri, device, dtype))
            clips[key] = loaded[uri]
    return clips


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
