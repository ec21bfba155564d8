"""Whose fault an error is: one row's, the whole batch's, or the device's.

Owns that distinction. Knows nothing of rows or of what is done about a fault.
"""

import torch

from rayjobs.diffusion.files.header import first_line

_SHORT = (
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_NOT_INITIALIZED",
)
"""What CUDA and its libraries call a lack of memory, beside torch's own error."""
_BROKEN = ("CUDA error", "device-side assert", "uncorrectable ECC", "Xid", "NVML", "cuDNN error")


class DeviceLost(RuntimeError):
    """The device cannot go on in this process: only a new process can use it again."""


class OutOfMemory(RuntimeError):
    """A batch of this shape does not fit; no row of it is to blame."""


def row_reason(error: BaseException) -> str:
    """Why one row failed, in a line. Raises DeviceLost or OutOfMemory when it is no row's fault."""
    check(error)
    return first_line(error)


def lacks_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SHORT)


def check(error: BaseException) -> None:
    """Raise DeviceLost or OutOfMemory when `error` is one of these underneath."""
    if lacks_memory(error):
        raise OutOfMemory(
            "out of memory; lower engine.batch_size or the images' size, or set "
            f"model.vae_slicing or model.vae_tiling ({first_line(error)})"
        ) from error
    text = str(error)
    if isinstance(error, torch.AcceleratorError) or any(sign in text for sign in _BROKEN):
        raise DeviceLost(first_line(error)) from error
