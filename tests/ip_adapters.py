"""Small random IP-Adapters in their authors' layout. Loads torch: import it inside fixtures."""

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

WIDTH, PROJECTED = 32, 24
"""Of the image encoder's patches, and of its embedding."""
DEPTH, HEAD, NUM_QUERIES = 4, 64, 6
SPREAD = 0.3
KINDS = ("plain", "plus", "full")


def save_encoder(folder: Path) -> str:
    """A CLIP image encoder, as transformers saves it; its folder."""
    torch.manual_seed(200)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 37, "projection_dim": PROJECTED}
    config = CLIPVisionConfig(
        **sizes, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8
    )
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    return str(folder)


def save_ip_adapters(model: Path, folder: Path) -> dict[str, str]:
    """Adapters for the model in a folder; their files by kind."""
    unet = UNet2DConditionModel.from_pretrained(model / "unet")
    width = unet.config.cross_attention_dim
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(300)
    files = {}
    for kind, projection in zip(KINDS, (_plain(width), _plus(width), _full(width)), strict=True):
        tensors = {f"image_proj.{name}": tensor for name, tensor in projection.items()}
        names = [name for name in unet.attn_processors if "attn2" in name]
        for number, name in enumerate(names):
            layer = unet.get_submodule(name.removesuffix(".processor"))
            for part in ("to_k", "to_v"):
                weight = torch.randn(getattr(layer, part).weight.shape) * SPREAD
                tensors[f"ip_adapter.{2 * number + 1}.{part}_ip.weight"] = weight
        files[kind] = str(folder / f"{kind}.safetensors")
        save_file(tensors, files[kind])
    return files


def _plain(width: int) -> dict[str, torch.Tensor]:
    return {**_linear("proj", PROJECTED, 4 * width), **_norm("norm", width)}


def _full(width: int) -> dict[str, torch.Tensor]:
    first, last = _linear("proj.0", WIDTH, WIDTH), _linear("proj.2", WIDTH, width)
    return {**first, **last, **_norm("proj.3", width)}


def _plus(width: int) -> dict[str, torch.Tensor]:
    tensors = {
        "latents": torch.randn(1, NUM_QUERIES, WIDTH) / WIDTH**0.5,
        **_linear("proj_in", WIDTH, WIDTH),
        **_linear("proj_out", WIDTH, width),
        **_norm("norm_out", width),
    }
    for n in range(DEPTH):
        tensors |= _norm(f"layers.{n}.0.norm1", WIDTH) | _norm(f"layers.{n}.0.norm2", WIDTH)
        tensors |= _linear(f"layers.{n}.0.to_q", WIDTH, HEAD, False)
        tensors |= _linear(f"layers.{n}.0.to_kv", WIDTH, 2 * HEAD, False)
        tensors |= _linear(f"layers.{n}.0.to_out", HEAD, WIDTH, False)
        tensors |= _norm(f"layers.{n}.1.0", WIDTH)
        tensors |= _linear(f"layers.{n}.1.1", WIDTH, 4 * WIDTH, False)
        tensors |= _linear(f"layers.{n}.1.3", 4 * WIDTH, WIDTH, False)
    return tensors


def _linear(name: str, num_in: int, num_out: int, bias: bool = True) -> dict[str, torch.Tensor]:
    weight = {f"{name}.weight": torch.randn(num_out, num_in) * SPREAD}
    return weight | ({f"{name}.bias": torch.randn(num_out) * SPREAD} if bias else {})


def _norm(name: str, width: int) -> dict[str, torch.Tensor]:
    return {
        f"{name}.weight": 1 + torch.randn(width) * SPREAD,
        f"{name}.bias": torch.randn(width) * SPREAD,
    }
