"""Small random models of each family, built in process. Loads torch: import it inside fixtures."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EDMDPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from rayjobs.starter import components

FAMILIES = ("sdxl", "sd", "playground")


@lru_cache(maxsize=2)
def reference_pipeline(folder: Path, sdxl_class: Any, sd_class: Any) -> tuple[Any, Any]:
    """diffusers' pipeline of a folder's family, loaded once, and its own scheduler's settings."""
    xl = "XL" in (folder / "model_index.json").read_text()
    pipeline = (sdxl_class if xl else sd_class).from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, pipeline.scheduler.config


def build_pipeline(name: str, root: Path) -> StableDiffusionXLPipeline | StableDiffusionPipeline:
    xl = name != "sd"
    tokenizers = [
        components.save_tokenizer(root / f"tokenizer-{pad[:1]}", pad)
        for pad in (components.END, "!")
    ]
    parts = {
        "vae": _vae(edm=name == "playground"),
        "unet": _unet(xl),
        "tokenizer": tokenizers[0],
        "text_encoder": CLIPTextModel(text_config(tokenizers[0])),
    }
    if not xl:
        betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
        scheduler = PNDMScheduler(**betas, skip_prk_steps=True, steps_offset=1)
        return StableDiffusionPipeline(
            **parts,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    scheduler = (
        EDMDPMSolverMultistepScheduler()
        if name == "playground"
        else EulerDiscreteScheduler.from_config(components.build_scheduler().config)
    )
    second = CLIPTextModelWithProjection(text_config(tokenizers[1]))
    return StableDiffusionXLPipeline(
        **parts,
        text_encoder_2=second,
        tokenizer_2=tokenizers[1],
        scheduler=scheduler,
        add_watermarker=False,
    )


def save_inpainting(folder: Path, to: Path) -> Path:
    """A model whose UNet takes a mask and the masked picture too, of the parts of another."""
    classes = StableDiffusionXLInpaintPipeline, StableDiffusionInpaintPipeline
    pipeline, _ = reference_pipeline.__wrapped__(folder, *classes)
    torch.manual_seed(1)
    pipeline.unet = UNet2DConditionModel.from_config({**pipeline.unet.config, "in_channels": 9})
    pipeline.save_pretrained(to)
    return to


def save_refiner(folder: Path, to: Path) -> Path:
    """A refiner beside an SDXL model: one text encoder, and a score among the sizes."""
    torch.manual_seed(2)
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    xl = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    width = {"cross_attention_dim": 32, "projection_class_embeddings_input_dim": 32 + 5 * 8}
    refiner = StableDiffusionXLImg2ImgPipeline(
        vae=pipeline.vae,
        unet=UNet2DConditionModel.from_config({**pipeline.unet.config, **xl, **width}),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=CLIPTextModelWithProjection(pipeline.text_encoder_2.config),
        tokenizer_2=pipeline.tokenizer_2,
        scheduler=pipeline.scheduler,
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )
    refiner.save_pretrained(to)
    return to


def text_config(tokenizer: components.CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=3,
        num_attention_heads=4,
        projection_dim=32,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _vae(edm: bool) -> AutoencoderKL:
    kinds = {
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    }
    normal = (
        {
            "latents_mean": [-1.6574, 1.886, -1.383, 2.5155],
            "scaling_factor": 0.5,
            "latents_std": [8.4927, 5.9022, 6.5498, 5.2299],
        }
        if edm
        else {}
    )
    return AutoencoderKL(
        block_out_channels=[16, 16, 16, 16],
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        **kinds,
        **normal,
    )


def _unet(xl: bool) -> UNet2DConditionModel:
    extra = (
        {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 32 + 6 * 8,
        }
        if xl
        else {}
    )
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=xl,
        cross_attention_dim=64 if xl else 32,
        norm_num_groups=8,
        **extra,
    )
