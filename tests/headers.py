"""Files that look like checkpoints from outside: their tensors are few, small and zero."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

UNET = "model.diffusion_model."
XL = {
    f"{UNET}input_blocks.0.0.weight": (8, 4, 3, 3),
    f"{UNET}out.2.weight": (4, 8, 3, 3),
    f"{UNET}label_emb.0.0.weight": (8, 8),
    f"{UNET}middle_block.1.transformer_blocks.0.attn2.to_k.weight": (8, 80),
    "first_stage_model.decoder.conv_in.weight": (8, 4, 3, 3),
    "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight": (8,),
    "conditioner.embedders.1.model.ln_final.weight": (8,),
}
SD1 = {name: shape for name, shape in XL.items() if "cond" not in name and "label" not in name}
SD1["cond_stage_model.transformer.text_model.final_layer_norm.weight"] = (8,)
SD2 = {name: shape for name, shape in SD1.items() if "cond" not in name}
SD2["cond_stage_model.model.ln_final.weight"] = (8,)
V, ZERO = {"v_pred": (0,)}, {"ztsnr": (0,)}
Shapes = Mapping[str, Sequence[int]]


def write(
    path: Path, shapes: Shapes, metadata: Mapping[str, str] | None = None, **arrays: Any
) -> str:
    tensors = {name: np.zeros(shape, np.float16) for name, shape in shapes.items()}
    save_file(tensors | arrays, path, metadata=dict(metadata or {}))
    return str(path)
