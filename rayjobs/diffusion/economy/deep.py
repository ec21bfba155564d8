"""The UNet with and without its deep blocks (DeepCache, arXiv 2312.00858).

Owns where the UNet is divided: before its last up block, which with the first down block is the
outermost of its levels. Knows nothing of rows. Legend: P slots, C H W latent channels and size.
"""

from collections.abc import Mapping
from typing import Any

import torch

DEEP = "deep_PCHW"
"""What the deep blocks gave, among a call's arguments."""
INTRABLOCK = "down_intrablock_additional_residuals"
"""Of those, the one that diffusers empties while it is read."""


def whole(unet: Any, x_PCHW: torch.Tensor, t_P: torch.Tensor, arguments: Mapping[str, Any]) -> Any:
    """The prediction (P, C, H, W)."""
    given = {name: list(it) if name == INTRABLOCK else it for name, it in arguments.items()}
    return unet(x_PCHW, t_P, return_dict=False, **given)[0]


def keeping(
    unet: Any, x_PCHW: torch.Tensor, t_P: torch.Tensor, arguments: Mapping[str, Any]
) -> Any:
    """The prediction, of the same bits, and what the deep blocks gave on the way to it."""
    kept: list[torch.Tensor] = []
    hook = unet.up_blocks[-1].register_forward_pre_hook(
        lambda _, args, given: kept.append(given["hidden_states"]), with_kwargs=True
    )
    try:
        noise_PCHW = whole(unet, x_PCHW, t_P, arguments)
    finally:
        hook.remove()
    return noise_PCHW, kept[0]


def reusing(
    unet: Any, x_PCHW: torch.Tensor, t_P: torch.Tensor, arguments: Mapping[str, Any]
) -> Any:
    """The prediction of the outermost blocks, with DEEP of the arguments in place of the others."""
    added = arguments.get("added_cond_kwargs")
    text = arguments["encoder_hidden_states"]
    time = unet.get_time_embed(sample=x_PCHW, timestep=t_P)
    time = unet.time_embedding(time, arguments.get("timestep_cond"))
    more = unet.get_aug_embed(emb=time, encoder_hidden_states=text, added_cond_kwargs=added)
    time = time if more is None else time + more
    time = time if unet.time_embed_act is None else unet.time_embed_act(time)
    text = unet.process_encoder_hidden_states(encoder_hidden_states=text, added_cond_kwargs=added)
    first, last = unet.down_blocks[0], unet.up_blocks[-1]
    x_PCHW = unet.conv_in(x_PCHW)
    # The level's way down ends with a smaller picture for the next one, which is not needed.
    _, skips = first(hidden_states=x_PCHW, temb=time, **_of_text(first, text))
    x_PCHW = last(
        hidden_states=arguments[DEEP],
        temb=time,
        res_hidden_states_tuple=(x_PCHW, *skips)[: len(last.resnets)],
        **_of_text(last, text),
    )
    if unet.conv_norm_out is not None:
        x_PCHW = unet.conv_act(unet.conv_norm_out(x_PCHW))
    return unet.conv_out(x_PCHW)


def _of_text(block: Any, text: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a block gets of the text: nothing, where it has no attention to it."""
    return {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}
