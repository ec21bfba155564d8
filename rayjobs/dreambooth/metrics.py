"""How good a tuned model is: subject and prompt likeness, preservation, diversity.

Owns the four numbers as the DreamBooth paper defines them (arXiv 2208.12242, section 4) and the
encoders they need. Knows nothing of how pictures were made. Legend: N pictures, D width.
"""

from itertools import combinations
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, CLIPModel

from rayjobs import storage
from rayjobs.config import BadInput
from rayjobs.diffusion.weights import first_line
from rayjobs.dreambooth.config import EncodersConfig
from rayjobs.starter import likeness

Pictures = list[Image.Image]


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
        self.model = _loaded("subject", uri, AutoModel).to(device).eval()
        self.processor = _loaded("subject", uri, AutoImageProcessor)

    @torch.no_grad()
    def features(self, pictures: Pictures) -> np.ndarray:
        features = []
        for picture in pictures:
            inputs = self.processor(picture.convert("RGB"), return_tensors="pt")
            output = self.model(inputs.pixel_values.to(self.model.device, self.model.dtype))
            features.append(_unit(output.last_hidden_state[:, 0]))
        return torch.cat(features).float().cpu().numpy()


class Clip:
    """CLIP's two towers; also a subject encoder (CLIP-I)."""

    def __init__(self, uri: str, device: str):
        self.model = _loaded("prompt", uri, CLIPModel).to(device).eval()
        self.processor = _loaded("prompt", uri, AutoImageProcessor)
        self.tokenizer = _loaded("prompt", uri, AutoTokenizer)

    @torch.no_grad()
    def features(self, pictures: Pictures) -> np.ndarray:
        features = []
        for picture in pictures:
            inputs = self.processor(picture.convert("RGB"), return_tensors="pt")
            pixels = inputs.pixel_values.to(self.model.device, self.model.dtype)
            features.append(_unit(self.model.get_image_features(pixel_values=pixels).pooler_output))
        return torch.cat(features).float().cpu().numpy()

    @torch.no_grad()
    def likeness(self, pictures: Pictures, prompts: list[str]) -> np.ndarray:
        length = self.model.config.text_config.max_position_embeddings
        texts = {}
        for prompt in dict.fromkeys(prompts):
            tokens = self.tokenizer(
                prompt,
                padding="max_length",
                truncation=True,
                max_length=length,
                return_tensors="pt",
            ).to(self.model.device)
            output = self.model.get_text_features(tokens.input_ids, tokens.attention_mask)
            texts[prompt] = _unit(output.pooler_output)[0].float().cpu().numpy()
        images_ND = self.features(pictures)
        return np.array(
            [float(x @ texts[prompt]) for x, prompt in zip(images_ND, prompts, strict=True)]
        )


def _load_subject(uri: str, device: str) -> SubjectEncoder:
    if uri == "starter":
        return Starter()
    return Clip(uri, device) if "clip" in uri.lower() else VisionTransformer(uri, device)


def _load_prompt(uri: str, device: str) -> PromptEncoder:
    return Starter() if uri == "starter" else Clip(uri, device)


def _loaded(name: str, uri: str, kind: Any) -> Any:
    local = storage.to_local(uri)
    weights = {"use_safetensors": True} if hasattr(kind, "forward") else {}
    try:
        return kind.from_pretrained(local, **weights)
    except Exception as error:
        raise BadInput(f"encoders.{name}: {uri!r} cannot be loaded: {first_line(error)}") from None


def _mean_cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float((one @ other.T).mean())


def _unit(x_ND: torch.Tensor) -> torch.Tensor:
    return x_ND / x_ND.norm(dim=-1, keepdim=True)


def _all(by_prompt: dict[str, Pictures]) -> Pictures:
    return [picture for pictures in by_prompt.values() for picture in pictures]
