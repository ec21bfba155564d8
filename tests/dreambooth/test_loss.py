"""The loss and its gradients are those that plain diffusers calls give, for every family."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from torch.func import functional_call

from rayjobs.dreambooth.data import bucketing
from rayjobs.dreambooth.data.schedule import Row
from rayjobs.dreambooth.training import worker
from rayjobs.dreambooth.training.batches import Batch
from tests.dreambooth.fitting import (
    ALPHA,
    PRIOR_WEIGHT,
    RANK,
    SIZES,
    differ,
    opened,
    resolved,
    settings,
)

pytestmark = pytest.mark.model


@pytest.mark.parametrize(("gamma", "drop"), [(None, 0.0), (5.0, 0.5)])
def test_the_loss_by_hand(
    folders: dict[str, Path], photos: Path, family: str, gamma: float | None, drop: float
) -> None:
    """One batch in plain diffusers: its loss, and its gradient for every factor of the adapters."""
    if family == "playground":
        gamma = None  # not defined for EDM
    config = settings(
        folders[family], photos, global_batch_size=4, caption_dropout=drop, min_snr_gamma=gamma
    )
    model = worker.load(config, "cpu", torch.float32)
    batches, module = worker.build(resolved(config), model, torch.float32)
    rows = batches.schedule.rows(3)
    assert any(row.caption is None for row in rows) == (drop > 0)
    batch = batches.batch(rows)
    pipeline = opened(folders[family])
    pipeline.unet.requires_grad_(False)
    assert differ(batch.z_BCHW, latents(pipeline, rows)) <= 1e-5
    factors = module.tuned.trainable()
    generator = torch.Generator().manual_seed(0)
    for factor in factors.values():
        torch.nn.init.normal_(factor, std=0.1, generator=generator)
    copies = {name: factor.detach().clone().requires_grad_() for name, factor in factors.items()}
    mine, wanted = module.losses(batch), by_hand(pipeline, batch, rows, copies, gamma)
    assert differ(mine, wanted) <= 1e-5 * max(1, wanted.max().item())
    mine.sum().backward()
    wanted.sum().backward()
    largest = max(gradient(copy).abs().max().item() for copy in copies.values())
    for name, copy in copies.items():
        assert gradient(copy).abs().max() > 0, name
        assert differ(gradient(factors[name]), gradient(copy)) <= 1e-5 * largest, name


def gradient(tensor: torch.Tensor) -> torch.Tensor:
    assert tensor.grad is not None
    return tensor.grad


def corner(row: Row) -> tuple[int, int]:
    """Left and top of the middle 64 x 64 pixels; no picture is scaled."""
    width, height = (64, 64) if row.view.is_prior else SIZES[row.view.photo.name]
    return (width - 64) // 2, (height - 64) // 2


@torch.no_grad()
def latents(pipeline: Any, rows: list[Row]) -> torch.Tensor:
    vae, found = pipeline.vae, []
    for row in rows:
        left, top = corner(row)
        cut = row.view.photo.open().crop((left, top, left + 64, top + 64))
        posterior = vae.encode(bucketing.to_pixels(cut)[None]).latent_dist
        noise = row.noise((4, 8, 8), "posterior")
        found.append(posterior.mean[0] + posterior.std[0] * noise)
    z_BCHW = torch.stack(found)
    if vae.config.latents_mean is None:
        return z_BCHW * vae.config.scaling_factor
    mean, std = (
        torch.tensor(each)[None, :, None, None]
        for each in (vae.config.latents_mean, vae.config.latents_std)
    )
    return (z_BCHW - mean) * vae.config.scaling_factor / std


def by_hand(
    pipeline: Any,
    batch: Batch,
    rows: list[Row],
    factors: dict[str, torch.Tensor],
    gamma: float | None,
) -> torch.Tensor:
    """The subject's loss and the prior's, weighted, with adapters as plain sums of weights."""
    added: dict[str, Any] = {}
    states_BLD, pooled_BP = said(pipeline, batch.captions, factors)
    if pooled_BP is not None:
        ids = []
        for row in rows:
            width, height = (64, 64) if row.view.is_prior else SIZES[row.view.photo.name]
            left, top = corner(row)
            ids.append([height, width, top, left, 64, 64])
        added = {"text_embeds": pooled_BP, "time_ids": torch.tensor(ids)}

    def unet(x_BCHW: torch.Tensor, timesteps_B: torch.Tensor) -> torch.Tensor:
        weights = summed(pipeline.unet, "unet", factors)
        words = {"encoder_hidden_states": states_BLD, "added_cond_kwargs": added}
        return functional_call(pipeline.unet, weights, (x_BCHW, timesteps_B), words).sample

    z, noise, scheduler = batch.z_BCHW, batch.noise_BCHW, pipeline.scheduler
    if type(scheduler).__name__.startswith("EDM"):
        sigma, data = batch.levels_B[:, None, None, None], scheduler.config.sigma_data
        noisy = z + sigma * noise
        raw = unet(scheduler.precondition_inputs(noisy, sigma), batch.levels_B.log() / 4)
        denoised = scheduler.precondition_outputs(noisy, raw, sigma)
        weighted = (sigma**2 + data**2) / (sigma * data) ** 2 * (denoised - z) ** 2
    else:
        ddpm: Any = DDPMScheduler.from_config(scheduler.config)
        steps_B = batch.levels_B.long()
        predicted = unet(ddpm.add_noise(z, noise, steps_B), steps_B)
        alphas_B = ddpm.alphas_cumprod[steps_B][:, None, None, None]
        snr_B = alphas_B / (1 - alphas_B)
        weight_B = torch.ones(()) if gamma is None else snr_B.clamp(max=gamma) / snr_B
        weighted = weight_B * (predicted - noise) ** 2
    of_prior = torch.tensor([row.view.is_prior for row in rows])
    return torch.stack([weighted[~of_prior].mean(), PRIOR_WEIGHT * weighted[of_prior].mean()])


def said(
    pipeline: Any, captions: list[str | None], factors: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What the text encoders say; SDXL's makers mean zeros by no text."""
    xl = hasattr(pipeline, "text_encoder_2")
    states, pooled_BP = [], None
    for suffix in ("", "_2") if xl else ("",):
        part = f"text_encoder{suffix}"
        encoder, tokenizer = getattr(pipeline, part), getattr(pipeline, f"tokenizer{suffix}")
        encoder.requires_grad_(False)
        words = [caption or "" for caption in captions]
        ids = tokenizer(
            words, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        ).input_ids
        asked = {"output_hidden_states": True}
        output = functional_call(encoder, summed(encoder, part, factors), (ids,), asked)
        states.append(output.hidden_states[-2] if xl else output.last_hidden_state)
        pooled_BP = output.text_embeds if suffix else None
    if not xl:
        return states[0], None
    assert pooled_BP is not None
    there_B1 = torch.tensor([[caption is not None] for caption in captions])
    return torch.cat(states, -1) * there_B1[:, :, None], pooled_BP * there_B1


def summed(network: Any, part: str, factors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every adapted weight W + alpha / rank B A, by its name in `network`."""
    found = {}
    for name, down in factors.items():
        if not name.endswith("lora_A.default.weight") or not is_of(name, part):
            continue
        up = factors[name.replace("lora_A", "lora_B")]
        layer = name.removesuffix(".lora_A.default.weight").split(".", 1 if part == "unet" else 2)
        weight = network.get_submodule(layer[-1]).weight
        found[f"{layer[-1]}.weight"] = weight + ALPHA / RANK * up @ down
    assert found
    return found


def is_of(name: str, part: str) -> bool:
    """Whether a factor is of this part: text encoders are numbered from 0 in checkpoints."""
    numbers = {"unet": "unet.", "text_encoder": "text_encoders.0."}
    return name.startswith(numbers.get(part, "text_encoders.1."))
