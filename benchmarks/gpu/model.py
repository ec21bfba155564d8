"""An SDXL model of the real shapes with random weights, made on the device: no hub, no files.

Owns the shapes. What such a model draws is noise; what it costs is what SDXL costs.
"""

from types import SimpleNamespace
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from rayjobs.diffusion.model import Model, ModelOptions, assemble
from rayjobs.diffusion.weights import locate

UNET: dict[str, Any] = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
THIN_UNET = UNET | {
    "sample_size": 8,
    "block_out_channels": (32, 64, 128),
    "attention_head_dim": (1, 2, 4),
    "cross_attention_dim": 64,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 32 + 48,
    "norm_num_groups": 8,
}
VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
    "force_upcast": True,
}
THIN_VAE = VAE | {"block_out_channels": (16, 16, 32, 32), "norm_num_groups": 8, "sample_size": 64}
TEXT = [
    {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "heads": 12},
    {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "heads": 20},
]
THIN_TEXT = [
    {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "heads": 2},
    {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "heads": 2},
]


def build(device: str, small: bool, held: Literal["float32", "auto"] = "auto") -> Model:
    """Random SDXL on `device`, in bfloat16 there and float32 on a CPU; `small`: a thin one."""
    dtype = torch.float32 if held == "float32" or device == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            parts = {
                "unet": UNet2DConditionModel(**(THIN_UNET if small else UNET)),
                "vae": AutoencoderKL(**(THIN_VAE if small else VAE)),
                **dict(zip(("text_encoder", "text_encoder_2"), encoders(small), strict=True)),
            }
    finally:
        torch.set_default_dtype(before)
    folder = locate("starter").path
    tokenizers = {
        name: AutoTokenizer.from_pretrained(folder / name) for name in ("tokenizer", "tokenizer_2")
    }
    pipeline = SimpleNamespace(
        **parts, **tokenizers, scheduler=scheduler(), config=SimpleNamespace()
    )
    options = ModelOptions(device=device, dtype=held, onednn=False)
    return assemble("random", pipeline, "0" * 64, options, family="sdxl")


def scheduler() -> EulerDiscreteScheduler:
    """SDXL-base's own."""
    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing="leading",
    )


def encoders(small: bool) -> list[Any]:
    made: list[Any] = []
    kinds: list[Any] = [CLIPTextModel, CLIPTextModelWithProjection]
    for kind, shape in zip(kinds, THIN_TEXT if small else TEXT, strict=True):
        rest: dict[str, Any] = dict(shape)
        config = CLIPTextConfig(
            vocab_size=49408,
            max_position_embeddings=77,
            bos_token_id=0,
            eos_token_id=2,
            pad_token_id=1,
            num_attention_heads=rest.pop("heads"),
            projection_dim=rest["hidden_size"],
            hidden_act="gelu",
            **rest,
        )
        made.append(kind(config))
    return made


def unet_inputs(
    model: Model, num: int, side: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """What a call of `num` places takes, each place with its own numbers; `side` in latents."""
    generator = torch.Generator(model.device).manual_seed(seed)
    config, device, dtype = model.unet.config, model.device, model.dtype

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    pooled = model.text_encoders[1].config.projection_dim
    ids = torch.tensor([[8.0 * side, 8.0 * side, 0, 0, 8.0 * side, 8.0 * side]] * num)
    x_PCHW = draw(num, config.in_channels, side, side)
    t_P = torch.linspace(981, 21, num, device=device) if num > 1 else torch.full((1,), 501.0)
    return (
        x_PCHW,
        t_P.to(device),
        {
            "encoder_hidden_states": draw(num, 77, config.cross_attention_dim),
            "added_cond_kwargs": {"text_embeds": draw(num, pooled), "time_ids": ids.to(device)},
        },
    )


def take(inputs: Any, places: list[int]) -> Any:
    """The same places of every tensor."""
    x_PCHW, t_P, arguments = inputs
    return (
        x_PCHW[places],
        t_P[places],
        {
            "encoder_hidden_states": arguments["encoder_hidden_states"][places],
            "added_cond_kwargs": {
                name: value[places] for name, value in arguments["added_cond_kwargs"].items()
            },
        },
    )


def call(unet: Any, inputs: Any) -> torch.Tensor:
    x_PCHW, t_P, arguments = inputs
    noise_PCHW: torch.Tensor = unet(x_PCHW, t_P, return_dict=False, **arguments)[0]
    return noise_PCHW
