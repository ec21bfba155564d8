"""The keys of a run's optimizer steps: data, loss, optimizer, rates.

Owns their names, types, defaults and the checks among them. Imports neither torch nor ray.
"""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from rayjobs.config import Config
from rayjobs.diffusion.text.syntax import PromptSyntax

BLOCKS = (
    "conv_in",
    "time_embedding",
    "add_embedding",
    "down_blocks",
    "mid_block",
    "up_blocks",
    "conv_norm_out",
    "conv_out",
)
"""Of a UNet, by their names in diffusers."""


class TrainConfig(Config):
    method: Literal["lora", "full"] = "lora"
    """lora trains an adapter, full all of the UNet."""
    steps: int = Field(default=500, ge=1)
    """Optimizer steps."""
    global_batch_size: int = Field(default=4, ge=1)
    """Photographs of an optimizer step, over all workers; each brings one class image."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Photographs that a worker takes at once; without it all of its share. Less memory, the same
    result."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """Of the UNet or its adapter."""
    text_encoders: bool = False
    """Train the text encoders too."""
    text_encoder_learning_rate: float | None = Field(default=None, gt=0)
    """Without it a tenth of learning_rate; for prodigy as much."""
    block_rates: dict[str, float] = Field(default={})
    """Factors of learning_rate by block of the UNet, as in {down_blocks: 0, up_blocks.1: 2}; the
    longest name that fits counts, 0 leaves a block as it is."""
    optimizer: Literal["adamw", "adamw8bit", "adafactor", "prodigy"] = "adamw"
    """adafactor needs little memory; adamw8bit needs bitsandbytes, prodigy needs prodigyopt
    (learning_rate 1)."""
    fused_backward: bool = False
    """Update each weight as soon as its gradient is there: memory for one gradient, not for all.
    On one worker, with buckets=false; max_grad_norm is then that of each gradient."""
    weight_decay: float = Field(default=1e-2, ge=0)
    """Of the optimizer."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Of the first moment's average."""
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    """Of the second moment's average."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to this norm."""
    schedule: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = "constant"
    """Of the learning rate, as in diffusers."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises from 0, for schedules with a warmup."""
    resolution: int | None = Field(default=None, ge=8)
    """Side of a square with as many pixels as a training picture; without it the model's own."""
    buckets: bool = True
    """Keep each photograph's shape, to the nearest of a few; else every one is cropped square."""
    crops: int = Field(default=4, ge=1)
    """Different crops of a photograph, where its shape leaves something to choose."""
    flip: bool = False
    """Mirror every other picture. Not for subjects with writing or a left and a right."""
    caption_syntax: PromptSyntax = "plain"
    """How captions are written, as prompts.syntax of jobs: plain ones are cut at 77 tokens; a1111
    takes longer ones, in chunks of 75, and its weights."""
    caption_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of pictures trained without their text."""
    shuffle_tags: bool = False
    """Captions are tags with commas between, in another order each time."""
    keep_tags: int = Field(default=0, ge=0)
    """The first tags that stay where they are, as the identifier does."""
    tag_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the other tags left out each time."""
    min_snr_gamma: float | None = Field(default=None, gt=0)
    """Weigh low-noise steps down (arXiv 2303.09556; 5 is usual). Not for EDM models."""
    debiased: bool = False
    """Weigh high-noise steps up, by 1 / sqrt(SNR) (arXiv 2310.08442). Not for EDM models."""
    loss: Literal["mse", "huber", "smooth_l1"] = "mse"
    """Of the prediction; the others (pseudo-Huber, in kohya's two scalings) forgive outliers."""
    huber_c: float = Field(default=0.1, gt=0)
    """Of huber and smooth_l1: errors well above it count linearly."""
    huber_schedule: Literal["snr", "constant"] = "snr"
    """snr: huber_c is that of pure noise, and rises to 1 as the noise falls, as kohya's."""
    masks: Literal["none", "alpha", "files"] = "none"
    """Where a photograph's loss counts: everywhere, where it is opaque, or where a file beside it
    is white (dog-masklabel.png for dog.jpg)."""
    mask_floor: float = Field(default=0.0, ge=0, lt=1)
    """What still counts outside the mask."""
    edm_sigmas: Literal["karras", "lognormal"] = "karras"
    """For EDM models: how noise levels are drawn."""
    noise_offset: float = Field(default=0.0, ge=0)
    """Share of noise that is the same over a whole channel."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: fp32 on a CPU, bf16 on a GPU. What is trained is kept in fp32."""
    gradient_checkpointing: bool = False
    """Less memory for about a third more time."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Export an exponential moving average of the weights, which warms up over the first steps."""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """fsdp shards weights and moments over the workers; auto: for full fine-tuning of SDXL on more
    than one GPU."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Decides noise, timesteps, crops, flips, order and dropout, each by its own key."""

    @property
    def usual_text_rate(self) -> float:
        # Prodigy has one rate for all.
        return self.learning_rate / (1 if self.optimizer == "prodigy" else 10)

    @field_validator("block_rates")
    @classmethod
    def _are_blocks(cls, rates: dict[str, float]) -> dict[str, float]:
        for name, factor in rates.items():
            if name.split(".")[0] not in BLOCKS:
                raise ValueError(
                    f"train.block_rates: {name!r} is no block of a UNet; its blocks are "
                    f"{', '.join(BLOCKS)}, and parts of them such as up_blocks.1.attentions.0"
                )
            if factor < 0:
                raise ValueError(f"train.block_rates: {name} is {factor}; give 0 or more")
        return rates

    @model_validator(mode="after")
    def _check_optimizer(self) -> "TrainConfig":
        if self.fused_backward and (self.buckets or self.micro_batch_size is not None):
            raise ValueError(
                "train.fused_backward makes one backward pass a step; give train.buckets=false and "
                "leave train.micro_batch_size out"
            )
        if self.fused_backward and self.precision == "fp16":
            raise ValueError("train.fused_backward has no loss scaling; use bf16 or fp32, not fp16")
        if self.fused_backward and self.optimizer in ("prodigy", "adamw8bit"):
            raise ValueError(
                f"train.fused_backward is for adafactor and adamw, not {self.optimizer}"
            )
        text = self.text_encoder_learning_rate
        if self.optimizer == "prodigy" and (
            (self.text_encoders and text not in (None, self.learning_rate))
            or any(factor not in (0, 1) for factor in self.block_rates.values())
        ):
            raise ValueError(
                "train.optimizer prodigy finds one rate for all; leave "
                "train.text_encoder_learning_rate and train.block_rates out"
            )
        return self

    @model_validator(mode="after")
    def _check_ranges(self) -> "TrainConfig":
        if self.resolution is not None and self.resolution % 8:
            near = max(8, round(self.resolution / 8) * 8)
            raise ValueError(
                f"train.resolution is {self.resolution}; it must be a multiple of 8, such as {near}"
            )
        if self.debiased and self.min_snr_gamma is not None:
            raise ValueError(
                "train.debiased and train.min_snr_gamma weigh the same steps in opposite ways; "
                "give one of them"
            )
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"train.warmup_steps is {self.warmup_steps}, but there are {self.steps} train.steps"
            )
        return self

    def ema_decay_at(self, step: int) -> float:
        """The average's decay at step 0, 1, ...: at first 0, then (1 + step) / (10 + step), up to
        ema_decay. As in diffusers' EMAModel: short runs do not export the weights they began with.
        """
        return min(self.ema_decay or 0.0, (1 + step) / (10 + step)) if step else 0.0
