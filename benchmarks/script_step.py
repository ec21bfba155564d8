"""The training step of diffusers' own DreamBooth script, stated anew to be timed beside ours."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    DDPMScheduler,
    StableDiffusionXLPipeline,
)
from diffusers.optimization import get_scheduler
from peft import LoraConfig
from PIL import Image

from benchmarks.tasks import CLASS_PROMPT, DEVICE, PROMPT, RANK, RATE, Marks, Task
from rayjobs.diffusion.weights import locate
from rayjobs.dreambooth.data import bucketing
from rayjobs.dreambooth.training.lora import ATTENTION
from rayjobs.dreambooth.training.worker import choose_precision


class Script:
    """The step of train_dreambooth_lora_sdxl.py, stated anew.

    From huggingface/diffusers at 58eb52c0803ea9af3abec60841c2a093bdf1f951,
    examples/dreambooth/train_dreambooth_lora_sdxl.py, with --with_prior_preservation, one instance
    prompt and frozen text encoders: both prompts are encoded once, the pictures in every step. What
    it costs to read pictures is left out in the script's favour: it opens and resizes each class
    image anew, and here all are tensors already. Nothing of accelerate is there but its autocast.
    """

    def __init__(self, task: Task, batch: int):
        self.batch, self.side = batch, task.side
        self.dtype = choose_precision("auto", DEVICE)
        folder = locate(task.model).path
        parts: Any = StableDiffusionXLPipeline.from_pretrained(
            folder, dtype=self.dtype, use_safetensors=True, add_watermarker=False
        ).to(DEVICE)
        self.unet, self.vae = parts.unet, parts.vae.to(torch.float32)
        for part in (self.vae, self.unet, parts.text_encoder, parts.text_encoder_2):
            part.requires_grad_(False)
        self.unet.add_adapter(
            LoraConfig(
                r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=[*ATTENTION]
            )
        )
        self.unet.train()
        self.noising: Any = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
        self.trained = [p for p in self.unet.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=RATE, weight_decay=1e-2, eps=1e-8)
        self.rates = get_scheduler("constant", self.optimizer, num_warmup_steps=0)
        said = [_encode_prompt(parts, prompt) for prompt in (PROMPT, CLASS_PROMPT)]
        self.states_2LD, self.pooled_2P = (torch.cat(both) for both in zip(*said, strict=True))
        self.instances = _read_pictures(task.pictures / "instance", task.side)
        self.classes = _read_pictures(task.pictures / "class", task.side)
        self._made = 0
        self.encoding = Marks()
        """Before and after the autoencoder's work in each step."""

    def run(self, num_steps: int) -> np.ndarray:
        """Make steps; return the seconds of all but the first."""
        marks = Marks()
        for _ in range(num_steps):
            self.step()
            marks.add()
        return marks.seconds()

    def step(self) -> float:
        places = range(self._made * self.batch, (self._made + 1) * self.batch)
        self._made += 1
        shown = [self.instances[place % len(self.instances)] for place in places]
        preserved = [self.classes[place % len(self.classes)] for place in places]
        pixels_BCHW = torch.stack(shown + preserved).contiguous().float().to(DEVICE)
        self.encoding.add()
        z_BCHW = self.vae.encode(pixels_BCHW).latent_dist.sample()
        self.encoding.add()
        z_BCHW = (z_BCHW * self.vae.config.scaling_factor).to(self.dtype)
        noise_BCHW = torch.randn_like(z_BCHW)
        num_levels = self.noising.config.num_train_timesteps
        timesteps_B = torch.randint(0, num_levels, (len(z_BCHW),), device=DEVICE)
        x_BCHW = self.noising.add_noise(z_BCHW, noise_BCHW, timesteps_B)
        loss = self._loss(self._predict(x_BCHW, timesteps_B), noise_BCHW)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.rates.step()
        self.optimizer.zero_grad()
        return loss.detach().item()

    def _predict(self, x_BCHW: torch.Tensor, timesteps_B: torch.Tensor) -> torch.Tensor:
        seen = [2 * self.side, 2 * self.side, 0, 0, self.side, self.side]
        ids = [torch.tensor([seen]).to(DEVICE, self.dtype) for _ in timesteps_B]
        added = {"time_ids": torch.cat(ids), "text_embeds": self.pooled_2P.repeat(self.batch, 1)}
        with torch.autocast(DEVICE, self.dtype, enabled=self.dtype != torch.float32):
            return self.unet(
                x_BCHW,
                timesteps_B,
                self.states_2LD.repeat(self.batch, 1, 1),
                added_cond_kwargs=added,
                return_dict=False,
            )[0]

    def _loss(self, predicted_BCHW: torch.Tensor, target_BCHW: torch.Tensor) -> torch.Tensor:
        predicted, predicted_prior = predicted_BCHW.float().chunk(2)
        target, target_prior = target_BCHW.float().chunk(2)
        return F.mse_loss(predicted, target) + 1.0 * F.mse_loss(predicted_prior, target_prior)


@torch.no_grad()
def _encode_prompt(parts: Any, prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
    states, pooled_1P = [], None
    for tokenizer, encoder in (
        (parts.tokenizer, parts.text_encoder),
        (parts.tokenizer_2, parts.text_encoder_2),
    ):
        tokens_1L = tokenizer(
            [prompt],
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        output = encoder(tokens_1L.to(DEVICE), output_hidden_states=True)
        states.append(output.hidden_states[-2])
        pooled_1P = output[0]
    assert pooled_1P is not None
    return torch.cat(states, dim=-1), pooled_1P


def _read_pictures(folder: Path, side: int) -> list[torch.Tensor]:
    """(3, side, side) in -1..1 of each."""
    size = (side, side)
    pictures = [Image.open(path).convert("RGB").resize(size) for path in sorted(folder.iterdir())]
    return [bucketing.to_pixels(picture) for picture in pictures]
