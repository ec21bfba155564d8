"""Whose fault an error is, and a picture that finds room the second time."""

import weakref
from typing import Any

import pytest
import torch

from rayjobs.diffusion.engine import Engine
from rayjobs.diffusion.faults import DeviceLost, OutOfMemory, check
from rayjobs.diffusion.model import Model
from rayjobs.diffusion.request import Request
from rayjobs.diffusion.vae import worker


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), OutOfMemory),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `x`"), OutOfMemory),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), OutOfMemory),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"), OutOfMemory),
        (torch.AcceleratorError("CUDA error: out of memory"), OutOfMemory),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), DeviceLost),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `x`"), DeviceLost),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), DeviceLost),
        (ValueError("a prompt that quotes CUDNN_STATUS_ALLOC_FAILED"), None),
    ],
)
def test_lack_of_memory_is_no_lost_device(error: Exception, kind: type[Exception] | None) -> None:
    if kind is None:
        check(error)
        return
    with pytest.raises(kind):
        check(error)


def test_a_picture_is_decoded_again_when_memory_is_free(
    tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And memory is given back only after what the first try computed is gone."""
    decode, held, alive = worker.decode_latents, list[Any](), list[bool]()

    def short(z_BCHW: torch.Tensor, model: Model) -> torch.Tensor:
        if held:
            return decode(z_BCHW, model)
        activations = torch.empty(8)
        held.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(worker, "decode_latents", short)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: alive.append(held[0]() is not None))
    (result,) = Engine(tiny, max_rows=1).generate([Request(prompt="a", steps=1)])
    assert result.image is not None, result.error
    assert alive == [False]
