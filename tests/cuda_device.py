"""The operators of a GPU where there is none: tensors that say cuda:0 around data of the CPU.

Owns which of them a GPU refuses, which its host waits for, and the count of both. Knows nothing of
streams, events or of how torch is made to believe in it: that is `cuda_twin`.
"""

import threading
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import _disable_current_modes, return_and_correct_aliasing
from torch.utils._pytree import tree_map

from tests.cuda_counts import Counts, Wait, where

aten = torch.ops.aten
CUDA = torch.device("cuda:0")
WAITING = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.repeat_interleave.Tensor,
    aten._linalg_check_errors.default,
    aten._unique2.default,
}
"""Operators that tell the host something of what is in a tensor."""
INDEXING = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}
ALLOCATING = {aten.empty.memory_format, aten.empty_strided.default, aten.empty_like.default}


class MixedDevices(RuntimeError):
    """An operator was given tensors of both devices."""


class ReadTooEarly(RuntimeError):
    """The host read a tensor whose copy from the device was not waited for."""


class Twin(torch.Tensor):
    """A tensor of the device; `inner` has its numbers."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "Twin":
        made: Any = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=CUDA,
        )
        made.inner = inner
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Twin({self.inner!r})"

    def record_stream(self, stream: Any) -> None:
        """Nothing is freed early here."""

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if _present is None:
            raise RuntimeError(f"{func} on a twin's tensor outside of twin_gpu()")
        return _present.call(func, args, kwargs or {})


class TwinGpu:
    """The device: takes each operator, and keeps count."""

    def __init__(self) -> None:
        self._counts: Counts | None = None
        self._pinned: set[StorageWeakRef] = set()
        self._coming: dict[StorageWeakRef, int] = {}
        """Host memory that copies to the host are written to, by their number."""
        self.num_copies = 0
        """To the host, so far."""

    @contextmanager
    def counting(self) -> Generator[Counts]:
        """What happens in this context, in every thread; an outer one counts it too."""
        outer, self._counts = self._counts, Counts()
        inner = self._counts
        try:
            yield inner
        finally:
            self._counts = outer
            if outer is not None:
                outer.add(inner)

    @contextmanager
    def unobserved(self, *modules: torch.nn.Module) -> Generator[None]:
        """Within this context modules run as the CPU runs them: many times sooner."""
        for module in modules:
            module.forward = partial(_run_inner, module, module.forward)
        try:
            yield
        finally:
            for module in modules:
                del module.forward

    def arrived(self, number: int) -> None:
        """All copies to the host up to this one are over."""
        self._coming = {ref: n for ref, n in self._coming.items() if n > number}

    def wait_for_all(self, what: str) -> None:
        self.wait(what)
        self.arrived(self.num_copies)

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors = list(_tensors((*args, *kwargs.values())))
        twins = [t for t in tensors if isinstance(t, Twin)]
        hosts = [t for t in tensors if not isinstance(t, Twin)]
        self._check_read(func, hosts)
        if func is aten.is_pinned.default:
            return _storage(args[0]) in self._pinned if hosts else False
        if func is aten._pin_memory.default:
            return self._pin(args[0].clone())
        if func is aten._to_copy.default:
            return self._to_copy(args[0], kwargs)
        if func is aten.copy_.default:
            return self._copy(*args, **kwargs)
        device = kwargs.get("device")
        if not twins and (device is None or torch.device(device).type != "cuda"):
            pinned = kwargs.pop("pin_memory", False)
            made = func(*args, **kwargs)
            return self._pin(made) if pinned else made
        return self._launch(func, args, kwargs, twins, hosts)

    def _launch(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        twins: list[Twin],
        hosts: list[torch.Tensor],
    ) -> Any:
        if twins and hosts:
            self._check_mixed(func, hosts)
        is_size_known = kwargs.get("output_size") is not None  # of what is repeated
        if (func in WAITING and not is_size_known) or (func in INDEXING and _has_mask(args[1])):
            self.wait_for_all(func.__name__)
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        inner = func(*tree_map(_unwrapped, args), **tree_map(_unwrapped, kwargs))
        if func is aten._local_scalar_dense.default:
            return inner
        is_view = func.is_view or func in (aten.detach.default, aten.alias.default)
        if not (is_view or func in ALLOCATING or func is aten._unsafe_view.default):
            self._count(func)
        made = tree_map(_wrapped, inner)
        return return_and_correct_aliasing(func, args, kwargs, made) if twins else made

    def _check_mixed(self, func: Any, hosts: list[torch.Tensor]) -> None:
        """Single numbers of the host go into arithmetic; nothing else does."""
        is_arithmetic = torch.Tag.pointwise in func.tags or func is aten.fill_.Tensor
        if not is_arithmetic or any(host.ndim for host in hosts):
            shapes = [tuple(host.shape) for host in hosts]
            raise MixedDevices(f"{func} of a GPU's tensors and the host's {shapes} at {where()}")

    def _check_read(self, func: Any, hosts: list[torch.Tensor]) -> None:
        if self._coming and func not in (aten.copy_.default, aten.detach.default):
            for host in hosts:
                if _storage(host) in self._coming:
                    raise ReadTooEarly(f"{func} at {where()}")

    def _to_copy(self, source: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        device = kwargs.pop("device", None)
        non_blocking = kwargs.pop("non_blocking", False)
        kwargs.pop("pin_memory", None)
        on_gpu = isinstance(source, Twin) if device is None else device.type == "cuda"
        made = aten._to_copy.default(_unwrapped(source), **kwargs)
        if isinstance(source, Twin) and not on_gpu:
            # torch pins what a non-blocking copy to the host is written to.
            self._to_host(self._pin(made) if non_blocking else made, non_blocking)
            return made
        if on_gpu and not isinstance(source, Twin):
            self._to_device(source, non_blocking)
        elif on_gpu:
            self._count(aten._to_copy.default)
        return Twin(made) if on_gpu else made

    def _copy(
        self, target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False
    ) -> torch.Tensor:
        aten.copy_.default(_unwrapped(target), _unwrapped(source))
        if isinstance(target, Twin) and isinstance(source, Twin):
            self._count(aten.copy_.default)
        elif isinstance(target, Twin):
            self._to_device(source, non_blocking)
        elif isinstance(source, Twin):
            self._to_host(target, non_blocking)
        return target

    def _to_device(self, source: torch.Tensor, non_blocking: bool) -> None:
        is_pinned = _storage(source) in self._pinned
        if not (non_blocking and is_pinned):
            kind = "pinned" if is_pinned else "not pinned"
            self.wait_for_all(f"copy to the device, {kind}, of {tuple(source.shape)}")
        elif self._counts is not None:
            self._counts.uploads += 1

    def _to_host(self, target: torch.Tensor, non_blocking: bool) -> None:
        self.num_copies += 1
        if self._counts is not None:
            self._counts.downloaded += target.nbytes
        if non_blocking and _storage(target) in self._pinned:
            self._coming[_storage(target)] = self.num_copies
        else:
            self.wait_for_all(f"copy to the host of {tuple(target.shape)}")

    def _pin(self, tensor: torch.Tensor) -> torch.Tensor:
        self._pinned = {ref for ref in self._pinned if not ref.expired()} | {_storage(tensor)}
        return tensor

    def wait(self, what: str) -> None:
        if self._counts is not None:
            wait = Wait(what, where(), threading.current_thread().name)
            self._counts.waits.append(wait)

    def _count(self, func: Any) -> None:
        if self._counts is not None:
            self._counts.launches[func.__name__] += 1


_present: TwinGpu | None = None
"""The one that tensors belong to."""


@contextmanager
def present(gpu: TwinGpu) -> Generator[None]:
    """Within this context tensors belong to it."""
    global _present
    _present = gpu
    try:
        yield
    finally:
        _present = None


def the_gpu() -> TwinGpu:
    assert _present is not None
    return _present


def _run_inner(module: torch.nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
    slots: list[Any] = [
        (tensors, name, tensor)
        for part in module.modules()
        for tensors in (part._parameters, part._buffers)
        for name, tensor in tensors.items()
        if isinstance(tensor, Twin)
    ]
    with _disable_current_modes():
        for tensors, name, tensor in slots:
            tensors[name] = tensor.inner
        try:
            made = forward(*tree_map(_unwrapped, args), **tree_map(_unwrapped, kwargs))
        finally:
            for tensors, name, tensor in slots:
                tensors[name] = tensor
        return tree_map(_wrapped, made)


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _unwrapped(value: Any) -> Any:
    return value.inner if isinstance(value, Twin) else value


def _wrapped(value: Any) -> Any:
    is_host = isinstance(value, torch.Tensor) and not isinstance(value, Twin)
    return Twin(value) if is_host else value


def _has_mask(indices: Any) -> bool:
    return any(index is not None and index.dtype == torch.bool for index in indices)


def _storage(tensor: torch.Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())
