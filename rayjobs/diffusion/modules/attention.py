"""A UNet's attention in a chosen one of torch's kernels.

torch's own way to choose, `sdpa_kernel`, holds for the whole process: an autoencoder that decodes
in another thread, whose wide heads only some kernels take, then finds none. Here a kernel is called
by its name, in those attention layers that were told so. Owns the names and what each kernel is
given.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

Kernel = Callable[..., torch.Tensor]
_ATTEND = F.scaled_dot_product_attention
ALIGNMENT = 16
"""Elements: a mask's rows begin where the efficient kernel takes them from."""


class NoKernel(RuntimeError):
    """The chosen kernel does not take such tensors, or not on this device."""


def use_kernel(unet: Any, name: str) -> None:
    """Have the attention of `unet` run in a kernel; `auto` leaves it to torch."""
    if name != "auto":
        processors = unet.attn_processors
        unet.set_attn_processor({key: _Chosen(each, name) for key, each in processors.items()})


class _Chosen:
    """An attention processor that runs in one kernel, also when it is recomputed."""

    def __init__(self, processor: Any, name: str):
        self._processor, self._name = processor, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            with _InsteadOfTorchs(KERNELS[self._name]):
                return self._processor(*args, **kwargs)
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except RuntimeError as error:
            raise NoKernel(f"attention {self._name}: {error}") from error


class _InsteadOfTorchs(TorchFunctionMode):
    """Within this context, and in this thread, attention is what `kernel` gives."""

    def __init__(self, kernel: Kernel):
        super().__init__()
        self._kernel = kernel

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        called = self._kernel if func is _ATTEND else func
        return called(*args, **(kwargs or {}))


def _math(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
) -> torch.Tensor:
    given = (q, k, v, attn_mask, dropout_p, is_causal)
    output: torch.Tensor = torch.ops.aten._scaled_dot_product_attention_math(*given)[0]
    return output


def _flash(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
) -> torch.Tensor:
    aten, given = torch.ops.aten, (q, k, v, dropout_p, is_causal)
    output: torch.Tensor
    if q.device.type == "cpu":
        output = aten._scaled_dot_product_flash_attention_for_cpu(*given, attn_mask=attn_mask)[0]
    elif attn_mask is not None:
        raise RuntimeError("it takes no mask")
    else:
        output = aten._scaled_dot_product_flash_attention(*given)[0]
    return output


def _with_whole_masks(operator: Any) -> Kernel:
    """Of those of torch's kernels that take a mask for every head and query."""

    def attend(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
    ) -> torch.Tensor:
        mask = _whole(attn_mask, q, k)
        output: torch.Tensor = operator(
            q, k, v, mask, torch.is_grad_enabled(), dropout_p, is_causal
        )[0]
        return output

    return attend


def _whole(mask: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor | None:
    """A mask for every head and query, whose rows begin at aligned places."""
    if mask is None:
        return None
    length = k.shape[-2]
    mask = F.pad(mask, (0, -length % ALIGNMENT))[..., :length]
    return mask.expand(*q.shape[:-1], length)


KERNELS: dict[str, Kernel] = {
    "math": _math,
    "flash": _flash,
    "efficient": _with_whole_masks(torch.ops.aten._scaled_dot_product_efficient_attention),
    "cudnn": _with_whole_masks(torch.ops.aten._scaled_dot_product_cudnn_attention),
}
