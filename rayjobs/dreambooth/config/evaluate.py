"""The keys of an evaluation, and its prompts.

Owns how lists of prompts are read, the DreamBooth paper's own file among them. Imports neither
torch nor ray.
"""

import re
from typing import Any, Literal

from pydantic import Field, field_validator

from rayjobs import storage
from rayjobs.config import BadInput, Config
from rayjobs.dreambooth.config import EncodersConfig, WorkersConfig
from rayjobs.models.options import Dtype, SourceConfig

QUOTED = re.compile(r"""^\s*(['"])(?P<text>.+)\1\s*(\.format\(.*\))?\s*,?\s*$""")
SECTIONS = {"object": "object prompts", "live": "live subject prompts"}


class SubjectConfig(Config):
    uri: str
    """The folder of the subject's photographs."""
    identifier: str
    """The word that the model was taught, as in sks."""
    class_word: str
    """What the subject is, as in dog."""
    class_prompt: str | None = None
    """Of pictures of the class, as prior.prompt of a run; without it "a photo of a CLASS_WORD"."""


class PromptsConfig(Config):
    inline: tuple[str, ...] = ()
    """Prompts with {0} for the identifier and {1} for the class word."""
    uri: str | None = None
    """Or a file of them, one a line; the paper's prompts_and_classes.txt is read as it is."""
    kind: Literal["object", "live"] = "object"
    """Which of the paper's two lists."""

    @field_validator("inline", mode="before")
    @classmethod
    def _one_or_more(cls, texts: Any) -> Any:
        return (texts,) if isinstance(texts, str) else texts


class ModelConfig(SourceConfig):
    uri: str
    """An export of `dreambooth`, local or s3://, or any model."""
    device: str = "auto"
    """auto, cpu or cuda."""
    dtype: Dtype = "auto"
    """auto: float32 on a CPU, bfloat16 on a GPU."""


class OutputConfig(Config):
    uri: str
    """Where pictures and metrics.json go; the same command goes on where it stopped."""


class EvaluateConfig(Config):
    model: ModelConfig
    before: ModelConfig | None = None
    """The model before training, from which the joint score then counts, as on a run's page."""
    subject: SubjectConfig
    prompts: PromptsConfig
    num_images: int = Field(default=4, ge=1)
    """Pictures of each prompt, with seeds 0, 1, ...; the paper has 4."""
    num_class_images: int = Field(default=32, ge=2)
    """Pictures of the class without identifier, for preservation and diversity."""
    steps: int | None = Field(default=None, ge=1, le=1000)
    """Denoising steps of a picture."""
    guidance_scale: float | None = Field(default=None, ge=0)
    """Of the pictures; without it the model's usual one."""
    encoders: EncodersConfig
    workers: WorkersConfig = WorkersConfig()
    output: OutputConfig


def read_prompts(config: EvaluateConfig) -> list[str]:
    """The prompts, with the identifier and the class word in their places."""
    texts = list(config.prompts.inline)
    if config.prompts.uri is not None:
        lines = storage.read_bytes(config.prompts.uri).decode("utf-8-sig").splitlines()
        texts += _of_file(lines, config.prompts.kind)
    if not texts:
        raise BadInput("no prompts; give prompts.inline or prompts.uri")
    words = {
        "{0}": config.subject.identifier,
        "{1}": config.subject.class_word,
        "{identifier}": config.subject.identifier,
        "{class}": config.subject.class_word,
    }
    prompts = []
    for text in texts:
        for place, word in words.items():
            text = text.replace(place, word)
        prompts.append(text)
    return list(dict.fromkeys(prompts))


def _of_file(lines: list[str], kind: str) -> list[str]:
    """Every line of a plain list; of the paper's file the quoted ones below the kind's heading."""
    headings = [line.strip().lower() for line in lines]
    if SECTIONS[kind] not in headings:
        return [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    prompts = []
    for line in lines[headings.index(SECTIONS[kind]) + 1 :]:
        if line.strip().lower() in SECTIONS.values():
            break
        quoted = QUOTED.match(line)
        if quoted:
            prompts.append(quoted["text"])
    return prompts
