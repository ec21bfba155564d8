"""The keys of a DreamBooth run.

Owns their names, types, defaults and the checks that need nothing but the file; those of its
optimizer steps are in `train`, those of an evaluation in `evaluate`. Imports neither torch nor ray.
"""

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from rayjobs.config import Config, Workers
from rayjobs.diffusion.text.syntax import PromptSyntax, check_syntax
from rayjobs.dreambooth.config.identifier import check_pair, identifier_in
from rayjobs.dreambooth.config.train import TrainConfig
from rayjobs.models.options import Attention, SourceConfig


class ModelConfig(SourceConfig):
    device: str = "auto"
    """auto, cpu or cuda."""
    attention: Attention = "auto"
    """torch's scaled-dot-product kernel."""


class InstanceConfig(Config):
    uri: str
    """The folder of the subject's photographs, local or s3://. Captions may lie beside them:
    `dog.txt` or `dog.caption` for `dog.jpg`, each line a caption, of which one is drawn each time;
    or a `metadata.jsonl` or `metadata.csv` with file_name and text."""
    prompt: str
    """What names the subject, as in "a photo of sks dog"; for photographs without caption."""
    repeats: int = Field(default=1, ge=1)
    """How often each photograph comes up, relative to those of `concepts`."""


class ConceptConfig(InstanceConfig):
    """One more subject that the same run learns."""

    class_prompt: str | None = None
    """Its class, as prior.prompt is that of instance; needed unless prior.mode is none."""
    class_uri: str | None = None
    """Where its class images are, as prior.uri; without it those of the same class_prompt, or new
    ones."""


class PriorConfig(Config):
    mode: Literal["images", "teacher", "none"] = "images"
    """What keeps the class as it was: class images, the untrained model's prediction on them, or
    nothing."""
    prompt: str | None = None
    """The class, as in "a photo of dog"."""
    num_images: int = Field(default=100, ge=1)
    """Class images; what is missing is made before training."""
    weight: float = Field(default=1.0, ge=0)
    """Of the prior's loss, relative to the subject's."""
    uri: str | None = None
    """Where class images are: a data set of the prior job, or a folder of photographs. Without it
    they are made below output.uri."""
    steps: int | None = Field(default=None, ge=1, le=1000)
    """Denoising steps of a class image that is made."""
    guidance_scale: float | None = Field(default=None, ge=0)
    """Of class images; without it the model's usual one."""


class LoraConfig(Config):
    kind: Literal["lora", "dora", "loha", "lokr"] = "lora"
    """Low-rank factors; these with the weight's length trained apart (dora); a Hadamard product of
    two such (loha); or a Kronecker product (lokr), the smallest file."""
    rank: int = Field(default=16, ge=1)
    """Of the adapter; its size grows with it."""
    alpha: float | None = Field(default=None, gt=0)
    """The adapter acts with alpha / rank; without it alpha is rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Of the adapter's input, in training; of kinds lora and dora."""
    plus_ratio: float = Field(default=1.0, gt=0)
    """How much faster the matrices B learn than A (LoRA+, arXiv 2402.12354; 16 is usual); of kinds
    lora and dora."""
    targets: Literal["attention", "transformer", "convolution"] = "attention"
    """Attention projections; these and the feed-forward layers; or both and the convolutions."""
    conv_rank: int | None = Field(default=None, ge=1)
    """Of the convolutions' part, with the same alpha / rank; without it as `rank`."""
    factor: int = Field(default=-1, ge=-1)
    """Of lokr: into how many parts a layer's width is divided; -1: near its square root."""

    @model_validator(mode="after")
    def _check_kind(self) -> Self:
        if self.dropout and self.kind in ("loha", "lokr"):
            raise ValueError(f"dropout is {self.dropout:g}; kind {self.kind} has none, so leave it")
        if self.plus_ratio != 1 and self.kind in ("loha", "lokr"):
            raise ValueError(f"plus_ratio is {self.plus_ratio:g}; kind {self.kind} has no matrix B")
        if self.factor != -1 and self.kind != "lokr":
            raise ValueError(f"factor is {self.factor}; it is of kind lokr")
        if self.factor == 0:
            raise ValueError("factor is 0; give -1, or a number of parts")
        if self.conv_rank is not None and self.targets != "convolution":
            raise ValueError(f"conv_rank is {self.conv_rank}; it is of targets convolution")
        return self


class InversionConfig(Config):
    num_vectors: int = Field(default=0, ge=0)
    """Learn the identifier as this many new tokens (textual inversion); 0: not at all."""
    token: str | None = None
    """The identifier's word in the prompts that stands for the new tokens, as in sks."""
    initial: str | None = None
    """A word whose embedding they start from; without it the class word's."""
    learning_rate: float = Field(default=5e-3, gt=0)
    """Of the new tokens."""
    alone: bool = False
    """Train nothing but the tokens."""


class WorkersConfig(Workers):
    """With max above min a run is elastic: it goes on with as few as min."""

    max_failures: int = Field(default=8, ge=-1)
    """Deaths of workers until the run gives up; -1: never."""
    resize_interval_s: float = Field(default=60, gt=0)
    """How often an elastic run looks whether the cluster has grown."""


class CheckpointConfig(Config):
    every_n_steps: int = Field(default=100, ge=1)
    """Steps between checkpoints."""
    keep: int = Field(default=2, ge=1)
    """Checkpoints that stay: the best one, where there is validation, and the latest."""


class EncodersConfig(Config):
    subject: str | None = None
    """For likeness, preservation and diversity: a vision transformer such as facebook/dino-vits16,
    or `starter` for the starter model's world."""
    prompt: str | None = None
    """For prompt likeness: a CLIP such as openai/clip-vit-large-patch14, or `starter`."""


class ValidationConfig(Config):
    every_n_steps: int = Field(default=0, ge=0)
    """Draw and measure pictures so often, beside training; 0: never. A multiple of
    checkpoint.every_n_steps."""
    prompts: tuple[str, ...] = ()
    """Prompts with the identifier; without them instance.prompt."""
    prompt_syntax: PromptSyntax = "plain"
    """How these prompts are written; instance.prompt and class prompts are drawn as plain texts."""
    num_images: int = Field(default=4, ge=1)
    """Pictures of each prompt, with seeds 0, 1, ..."""
    num_class_images: int = Field(default=32, ge=2)
    """Pictures of the class without identifier, for preservation and diversity."""
    steps: int | None = Field(default=None, ge=1, le=1000)
    """Denoising steps of a picture."""
    guidance_scale: float | None = Field(default=None, ge=0)
    """Of the pictures; without it the model's usual one."""
    encoders: EncodersConfig = EncodersConfig()
    loss_every_n_steps: int = Field(default=0, ge=0)
    """Measure the loss so often at fixed noise, where it can be compared; 0: never."""
    loss_uri: str | None = None
    """Photographs held out for that, with captions as those of instance; without it the run's."""
    loss_levels: int = Field(default=8, ge=1)
    """Noise levels at which each of them is measured."""
    patience: int | None = Field(default=None, ge=1)
    """End the run when so many of these losses in a row are no better than the best; the best one's
    checkpoint is exported."""
    num_gpus: float = Field(default=0, ge=0)
    """GPUs of the process that validates."""
    num_cpus: float = Field(default=1, gt=0)
    """CPUs of the process that validates."""


class RunConfig(Config):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    """The same name and output.uri continue a run; a finished one does nothing."""


class OutputConfig(Config):
    uri: str
    """The run's folder, local or s3://: checkpoints/, export/, logs/, index.html."""
    cache: bool = True
    """Encode pictures and prompts once, and keep that below output.uri."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Of an exported model; a LoRA file is always float32."""
    fused: bool = False
    """Also export a whole model that needs neither adapter nor learned embeddings."""
    kohya: bool = False
    """Also export the adapter in kohya's layout, for ComfyUI and A1111."""
    peft: bool = False
    """Also export the adapter in peft's layout, a folder for each network that it is for."""


class TrackersConfig(Config):
    wandb: dict[str, Any] | None = None
    """Keyword arguments of Lightning's WandbLogger; needs wandb."""
    mlflow: dict[str, Any] | None = None
    """Keyword arguments of Lightning's MLFlowLogger; needs mlflow."""


class DreamBoothConfig(Config):
    model: ModelConfig
    instance: InstanceConfig
    concepts: tuple[ConceptConfig, ...] = ()
    """More subjects beside instance, each with its own photographs, words and class."""
    prior: PriorConfig = PriorConfig()
    train: TrainConfig = TrainConfig()
    lora: LoraConfig = LoraConfig()
    inversion: InversionConfig = InversionConfig()
    workers: WorkersConfig = WorkersConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    validation: ValidationConfig = ValidationConfig()
    trackers: TrackersConfig = TrackersConfig()
    run: RunConfig
    output: OutputConfig

    @field_validator("validation")
    @classmethod
    def _has_prompts(cls, validation: ValidationConfig) -> ValidationConfig:
        for prompt in validation.prompts:
            if not prompt.strip():
                raise ValueError("validation.prompts has an empty prompt; remove it")
            check_syntax(f"validation.prompts: {prompt!r:.80}", prompt, validation.prompt_syntax)
        return validation

    @model_validator(mode="after")
    def _check_combinations(self) -> "DreamBoothConfig":
        self._check_prompts()
        self._check_inversion()
        for name, count in (("min", self.workers.min), ("max", self.workers.max_workers)):
            if self.train.global_batch_size % count:
                raise ValueError(
                    f"train.global_batch_size is {self.train.global_batch_size}, which "
                    f"workers.{name}={count} workers cannot share evenly; give a multiple of it"
                )
        every = self.validation.every_n_steps
        if every and every % self.checkpoint.every_n_steps:
            raise ValueError(
                f"validation.every_n_steps is {every}; it must be a multiple of "
                f"checkpoint.every_n_steps, {self.checkpoint.every_n_steps}"
            )
        if self.train.fused_backward and self.workers.max_workers > 1:
            raise ValueError(
                "train.fused_backward updates weights before workers could share gradients; give "
                "workers.max=1"
            )
        varies = self.lora.plus_ratio != 1 or self.inversion.num_vectors
        if self.train.optimizer == "prodigy" and varies:
            raise ValueError(
                "train.optimizer prodigy finds one rate for all; leave lora.plus_ratio and "
                "inversion.num_vectors out"
            )
        self._check_patience()
        if self.train.strategy == "fsdp" and self.train.precision == "fp16":
            raise ValueError("train.precision fp16 has no loss scaling under fsdp; use bf16")
        if self.train.strategy == "fsdp" and self.train.method != "full":
            raise ValueError("train.strategy fsdp is for train.method full; a LoRA is small")
        return self

    @property
    def identifier(self) -> str:
        """The word that means the subject: a rare one, or the token that is learned."""
        if self.inversion.token:
            return self.inversion.token
        return identifier_in(self.instance.prompt, self.prior.prompt or "")

    @property
    def export_kind(self) -> str:
        """What is exported: `lora`, `full` or `words`, as in the note beside it."""
        return "words" if self.inversion.alone else self.train.method

    def _check_patience(self) -> None:
        every, saves = self.validation.loss_every_n_steps, self.checkpoint.every_n_steps
        if self.validation.patience is None:
            return
        if not every:
            raise ValueError(
                "validation.patience waits for losses that are not measured; give "
                "validation.loss_every_n_steps"
            )
        if every % saves:
            raise ValueError(
                f"validation.loss_every_n_steps is {every}; with validation.patience it must be a "
                f"multiple of checkpoint.every_n_steps, {saves}"
            )

    def _check_inversion(self) -> None:
        inversion = self.inversion
        if inversion.num_vectors and self.concepts:
            raise ValueError(
                "inversion.num_vectors learns the word of one subject; leave it out, or concepts"
            )
        if inversion.alone and not inversion.num_vectors:
            raise ValueError("inversion.alone trains new tokens only; give inversion.num_vectors")
        if inversion.alone and self.train.block_rates:
            raise ValueError("inversion.alone trains no block; leave train.block_rates out")
        if inversion.alone and self.train.text_encoders:
            raise ValueError(
                "inversion.alone trains no layer of a text encoder, only the new tokens; leave "
                "train.text_encoders out, or inversion.alone"
            )
        if not inversion.num_vectors:
            return
        if self.identifier not in self.instance.prompt.split():
            raise ValueError(
                f"instance.prompt {self.instance.prompt!r} lacks the word to learn, "
                f"{self.identifier!r}; give one as inversion.token, such as <sks>, and put it into "
                "the prompt"
            )
        if not inversion.initial and not self.prior.prompt:
            raise ValueError("inversion.initial is missing: a word to start from, such as dog")
        if self.train.strategy == "fsdp":
            raise ValueError("inversion.num_vectors is not for train.strategy fsdp; use ddp")

    def _check_prompts(self) -> None:
        keys = [("instance.prompt", self.instance.prompt, "prior.prompt", self.prior.prompt)]
        for number, concept in enumerate(self.concepts):
            key = f"concepts[{number}]"
            own = (f"{key}.prompt", concept.prompt, f"{key}.class_prompt", concept.class_prompt)
            keys.append(own)
        seen: dict[str, str] = {}
        for key, prompt, class_key, class_prompt in keys:
            if not prompt.split():
                raise ValueError(f"{key} is empty; write what names the subject")
            if self.prior.mode != "none":
                check_pair(key, prompt, class_key, class_prompt)
            if prompt in seen:
                raise ValueError(f"{key} is that of {seen[prompt]}; give each subject its own word")
            seen[prompt] = key
