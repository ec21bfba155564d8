"""How good a tuned model is: subject and prompt likeness, preservation, diversity.

Owns the four numbers as the DreamBooth paper defines them (arXiv 2208.12242, section 4) and the
encoders they need. Knows nothing of how pictures were made. Legend: N pictures, D width.
"""

from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from PIL import Image
from transformers import AutoModel

from rayjobs import storage
from rayjobs.config import BadInput
from rayjobs.diffusion.files.folder import refuse_pickles
from rayjobs.dreambooth.config import EncodersConfig
from rayjobs.quality import pretrained
from rayjobs.starter import likeness

Pictures = list[Image.Image]
T = TypeVar("T")


class SubjectEncoder(Protocol):
    def features(self, pictures: Pictures) -> np.ndarray:
        """Unit vectors (N, D) in which the same subject is near to itself."""
        ...


class PromptEncoder(Protocol):
    def likeness(self, pictures: Pictures, prompts: list[str]) -> np.ndarray:
        """(N,): how well each picture fits its prompt."""
        ...


def measure(
    subject: SubjectEncoder,
    prompt: PromptEncoder | None,
    real: Pictures,
    made: dict[str, Pictures],
    of_class: dict[str, Pictures],
) -> dict[str, float]:
    """The metrics of pictures by prompt: of the subject, and of its class without identifier.

    subject_likeness: mean cosine of made and real pictures of the subject; higher is better.
    prompt_likeness: mean fit of made pictures to their prompts; higher is better.
    preservation (PRES): mean cosine of class pictures and the subject's real ones; lower is better.
    diversity (DIV): mean distance (1 - cosine) of pictures of one class prompt; higher is better.
    The paper takes DINO ViT-S/16 for the first and third, CLIP for the second, and LPIPS for the
    last; here the subject encoder's distance stands for LPIPS.
    """
    real_ND = subject.features(real)
    values = {"subject_likeness": _mean_cosine(subject.features(_all(made)), real_ND)}
    if prompt is not None:
        prompts = [text for text, pictures in made.items() for _ in pictures]
        values["prompt_likeness"] = float(prompt.likeness(_all(made), prompts).mean())
    if of_class:
        features = [subject.features(pictures) for pictures in of_class.values()]
        values["preservation"] = _mean_cosine(np.concatenate(features), real_ND)
        distances = [1 - float(a @ b) for some in features for a, b in combinations(some, 2)]
        if distances:
            values["diversity"] = float(np.mean(distances))
    return values


def mean(measured: list[dict[str, float]]) -> dict[str, float]:
    """Each metric's mean over several subjects."""
    names = dict.fromkeys(name for values in measured for name in values)
    return {
        name: float(np.mean([values[name] for values in measured if name in values]))
        for name in names
    }


def joint_score(metrics: dict[str, float], before: dict[str, float] | None = None) -> float:
    """One number to choose a checkpoint by, 0..1: the geometric mean of what is wanted.

    Subject likeness alone grows as a model overfits; then prompt likeness falls and preservation
    (the class's likeness to the subject) rises, so that the product falls. With the numbers of the
    model `before` training: the share of the way to the subject that is gone, and the shares of the
    rest that are kept. Without that, a class that looks like the subject from the start would make
    every step of learning look like a loss.
    """
    start = before or {}
    parts = []
    if "subject_likeness" in metrics:
        at_first = min(start.get("subject_likeness", 0.0), 0.99)
        parts.append((metrics["subject_likeness"] - at_first) / (1 - at_first))
    if "prompt_likeness" in metrics:
        parts.append(metrics["prompt_likeness"] / max(start.get("prompt_likeness", 1.0), 0.01))
    if "preservation" in metrics:
        room = max(1 - start.get("preservation", 0.0), 0.01)
        parts.append((1 - metrics["preservation"]) / room)
    return float(np.prod(np.clip(parts, 0, 1)) ** (1 / len(parts))) if parts else 0.0


def load_encoders(
    config: EncodersConfig, device: str
) -> tuple[SubjectEncoder | None, PromptEncoder | None]:
    """The encoders that a configuration names. Raises BadInput for one that cannot be loaded."""
    subject = None if config.subject is None else _load_subject(config.subject, device)
    prompt = None if config.prompt is None else _load_prompt(config.prompt, device)
    return subject, prompt


class Starter:
    """Both encoders of the starter model's world."""

    def features(self, pictures: Pictures) -> np.ndarray:
        return likeness.features([np.asarray(p.convert("RGB")) for p in pictures])

    def likeness(self, pictures: Pictures, prompts: list[str]) -> np.ndarray:
        pairs = zip(pictures, prompts, strict=True)
        return np.array(
            [likeness.prompt_likeness(np.asarray(p.convert("RGB")), t) for p, t in pairs]
        )


class VisionTransformer:
    """DINO, or another vision transformer: the class token of the last layer."""

    def __init__(self, uri: str, device: str):
        refuse_pickles([Path(uri)])
        # A pooler may be missing, which is not used.
        model = pretrained.pretrained(uri, AutoModel, use_safetensors=True)
        self.model = model.to(device).eval()
        self.processor = pretrained.load_processor(uri)

    @torch.no_grad()
    def features(self, pictures: Pictures) -> np.ndarray:
        features = []
        for picture in pictures:
            pixels = pretrained.pixels_for(self.processor, picture, self.model)
            features.append(_unit(self.model(pixels).last_hidden_state[:, 0]))
        return torch.cat(features).float().cpu().numpy()


class ClipEncoder:
    """CLIP's two towers; also a subject encoder (CLIP-I)."""

    def __init__(self, uri: str, device: str):
        self.clip = pretrained.Clip(uri, device)

    def features(self, pictures: Pictures) -> np.ndarray:
        return torch.stack([self.clip.embed_image(picture) for picture in pictures]).cpu().numpy()

    def likeness(self, pictures: Pictures, prompts: list[str]) -> np.ndarray:
        texts = {each: self.clip.embed_text(each).cpu().numpy() for each in dict.fromkeys(prompts)}
        pairs = zip(self.features(pictures), prompts, strict=True)
        return np.array([float(x @ texts[prompt]) for x, prompt in pairs])


def _load_subject(uri: str, device: str) -> SubjectEncoder:
    if uri == "starter":
        return Starter()
    kind = ClipEncoder if "clip" in uri.lower() else VisionTransformer
    return _loaded("subject", uri, lambda path: kind(path, device))


def _load_prompt(uri: str, device: str) -> PromptEncoder:
    if uri == "starter":
        return Starter()
    return _loaded("prompt", uri, lambda path: ClipEncoder(path, device))


def _loaded(name: str, uri: str, load: Callable[[str], T]) -> T:
    path = storage.to_local(uri)
    try:
        return load(path)
    except ValueError as error:
        reason = str(error).removeprefix(f"{path} cannot be loaded: ")
        raise BadInput(f"encoders.{name}: {uri!r} cannot be loaded: {reason}") from None


def _mean_cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float((one @ other.T).mean())


def _unit(x_ND: torch.Tensor) -> torch.Tensor:
    return x_ND / x_ND.norm(dim=-1, keepdim=True)


def _all(by_prompt: dict[str, Pictures]) -> Pictures:
    return [picture for pictures in by_prompt.values() for picture in pictures]
