"""A pipeline in one file with the original names of Stable Diffusion and SDXL, as tools write it.

The names are the inverse of what diffusers' converter reads.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from rayjobs.diffusion.adapters import ldm
from tests import families

Tensors = dict[str, torch.Tensor]


def build_xl(root: Path) -> Any:
    """A small random SDXL with text encoders of two sizes, by which those of a file are told."""
    torch.manual_seed(0)
    pipeline = families.build_pipeline("sdxl", root)
    config = families.text_config(pipeline.tokenizer_2)
    config.hidden_size, config.intermediate_size = 48, 64
    pipeline.text_encoder_2 = families.CLIPTextModelWithProjection(config)
    values = {**pipeline.unet.config, "cross_attention_dim": 80}
    pipeline.unet = families.UNet2DConditionModel.from_config(values)
    return pipeline


def tensors(pipeline: Any, open_clip: bool = False) -> Tensors:
    """All weights of a pipeline; of Stable Diffusion 2.x with OpenCLIP's names for its encoder."""
    found = {f"model.diffusion_model.{name}": tensor for name, tensor in _unet(pipeline.unet)}
    found |= {f"first_stage_model.{name}": tensor for name, tensor in _vae(pipeline.vae)}
    if pipeline.text_encoder is None:
        found |= _open_clip(pipeline.text_encoder_2, "conditioner.embedders.0.model.")
    elif hasattr(pipeline, "text_encoder_2"):
        found |= _clip(pipeline.text_encoder, "conditioner.embedders.0.transformer.text_model.")
        found |= _open_clip(pipeline.text_encoder_2, "conditioner.embedders.1.model.")
    elif open_clip:
        found |= _open_clip(pipeline.text_encoder, "cond_stage_model.model.")
    else:
        found |= _clip(pipeline.text_encoder, "cond_stage_model.transformer.text_model.")
    return found


def save(path: Path, weights: Tensors, metadata: Mapping[str, str] | None = None) -> Path:
    whole = {name: tensor.detach().clone().contiguous() for name, tensor in weights.items()}
    save_file(whole, path, metadata=dict(metadata or {}))
    return path


def _unet(unet: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """By names that `test_names` holds against diffusers' converter."""
    blocks = ldm.block_names(unet)
    for name, tensor in unet.state_dict().items():
        layer, _, end = name.rpartition(".")
        yield f"{ldm.original_name(layer, blocks)}.{end}", tensor


def _vae(vae: Any) -> Iterator[tuple[str, torch.Tensor]]:
    last = len(vae.config.block_out_channels) - 1
    attention = {
        "group_norm": "norm",
        "to_q": "q",
        "to_k": "k",
        "to_v": "v",
        "to_out.0": "proj_out",
    }
    for name, tensor in vae.state_dict().items():
        name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{last - int(m[1])}.block", name)
        name = re.sub(
            r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{last - int(m[1])}.upsample", name
        )
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        found = re.match(r"(.*)mid_block\.attentions\.0\.(.*)\.(weight|bias)", name)
        if found:
            name = f"{found[1]}mid.attn_1.{attention[found[2]]}.{found[3]}"
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        yield name, tensor


def _clip(encoder: Any, prefix: str) -> Tensors:
    state = encoder.state_dict()
    return {prefix + name.removeprefix("text_model."): tensor for name, tensor in state.items()}


def _open_clip(encoder: Any, prefix: str) -> Tensors:
    state = {name.removeprefix("text_model."): it for name, it in encoder.state_dict().items()}
    names = {"final_layer_norm": "ln_final", "embeddings.token_embedding": "token_embedding"}
    inner = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc"}
    inner |= {"mlp.fc2": "mlp.c_proj", "self_attn.out_proj": "attn.out_proj"}
    found: Tensors = {"positional_embedding": state["embeddings.position_embedding.weight"]}
    if "text_projection.weight" in state:
        found["text_projection"] = state["text_projection.weight"].T
    for name, tensor in state.items():
        layer = re.match(r"encoder\.layers\.(\d+)\.(.*)\.(weight|bias)", name)
        stem, _, end = name.rpartition(".")
        if layer and layer[2] == "self_attn.q_proj":
            parts = [state[name.replace("q_proj", f"{each}_proj")] for each in "qkv"]
            block = f"transformer.resblocks.{layer[1]}.attn.in_proj_{layer[3]}"
            found[block] = torch.cat(parts)
        elif layer and layer[2] in inner:
            found[f"transformer.resblocks.{layer[1]}.{inner[layer[2]]}.{layer[3]}"] = tensor
        elif stem in names:
            found[f"{names[stem]}.{end}"] = tensor
    return {prefix + name: tensor for name, tensor in found.items()}
