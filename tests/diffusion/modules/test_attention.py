"""A chosen attention kernel: in the layers that were told so, in their thread, and nowhere else."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from rayjobs.diffusion.model import ModelOptions, load_model
from rayjobs.diffusion.modules import attention

pytestmark = pytest.mark.model


def attend(mask: bool = False) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(2, 3, 9, 8, generator=generator) for _ in range(3)]
    return (*given, torch.randn(2, 1, 1, 9, generator=generator)) if mask else (*given,)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("name", ["math", "flash"])
def test_a_kernel_gives_what_torchs_own_choice_gives(name: str, mask: bool) -> None:
    given = attend(mask=mask)
    expected = F.scaled_dot_product_attention(*given)
    assert (attention.KERNELS[name](*given) - expected).abs().max() < 1e-6


def test_masks_are_whole_and_aligned_where_kernels_need_it() -> None:
    q, k, _, mask = attend(mask=True)
    whole = attention._whole(mask, q, k)
    assert whole is not None
    assert whole.shape == (2, 3, 9, 9)
    assert whole.stride(0) % attention.ALIGNMENT == 0
    assert torch.equal(whole[1, 2, 3], mask[1, 0, 0])


def test_other_threads_and_the_process_are_left_alone(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(str(folders["sdxl"]), ModelOptions(attention="math"))
    plain, given, beside = attention.KERNELS["math"], attend(), []
    seen: list[bool] = []

    def elsewhere() -> None:
        beside.append(F.scaled_dot_product_attention(*given))

    def kernel(*args: Any, **kwargs: Any) -> torch.Tensor:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        seen.append(torch.backends.cuda.flash_sdp_enabled())
        return plain(*args, **kwargs)

    monkeypatch.setitem(attention.KERNELS, "math", kernel)
    latents = torch.zeros(1, 4, 8, 8)
    added = {"text_embeds": torch.zeros(1, 32), "time_ids": torch.zeros(1, 6)}
    text = torch.zeros(1, 77, 64)
    with torch.no_grad():
        model.unet(latents, 1, encoder_hidden_states=text, added_cond_kwargs=added)
        model.vae.decode(latents)
    num_layers = len(model.unet.attn_processors)
    assert seen == [True] * num_layers
    assert len(beside) == num_layers


def test_a_kernel_that_there_is_not(folders: dict[str, Path]) -> None:
    model = load_model(str(folders["sdxl"]), ModelOptions(attention="efficient"))
    added = {"text_embeds": torch.zeros(1, 32), "time_ids": torch.zeros(1, 6)}
    text = torch.zeros(1, 77, 64)
    with pytest.raises(attention.NoKernel, match="attention efficient: Could not run"):
        model.unet(torch.zeros(1, 4, 8, 8), 1, encoder_hidden_states=text, added_cond_kwargs=added)
