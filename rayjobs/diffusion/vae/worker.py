"""The autoencoder's work beside the steps: encoding init images and decoding finished latents.

Owns when and on which thread that work runs. On a GPU it has a thread and a stream of its own, so
that no step waits for the autoencoder. On a CPU one picture is encoded or decoded between two
steps, never more, so that other rows wait for one at most.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import TYPE_CHECKING, Any, Protocol

import torch
from PIL.Image import Image

from rayjobs.diffusion.faults import OutOfMemory, lacks_memory, row_reason
from rayjobs.diffusion.model import Model
from rayjobs.diffusion.modules.side import SideStream
from rayjobs.diffusion.vae.latents import decode_latents, to_image

if TYPE_CHECKING:
    from rayjobs.diffusion.rows.row import Row

Decoded = tuple[torch.Tensor | None, Image]
NOT_FINITE = "the latents are not finite (NaN or infinity)"


class VaeWorker:
    """Takes one picture a call, so that the autoencoder's shape never varies.

    A picture that does not fit the memory ends everything, unless `isolate_oom`: then its row.
    """

    def __init__(self, model: Model, isolate_oom: bool = False):
        self.isolate_oom = isolate_oom
        beside = model.device.startswith("cuda")
        self._executor: _Executor = _SideExecutor(model.device) if beside else _InlineExecutor()
        self._encoding: dict[Future[None], Row] = {}
        self._decoding: dict[Future[Decoded], Row] = {}

    def encode(self, row: Row) -> None:
        """Make the first latents of a row from its init image, or from the pass before."""
        self._encoding[self._executor.submit(row.encode_init)] = row

    def decode(self, row: Row, keep_pixels: bool = False) -> None:
        """Make the picture of a row that has taken its last step, and keep its float pixels."""
        work = self._executor.submit(decode_row, row, keep_pixels)
        self._decoding[work] = row

    def cancel(self, row: Row) -> None:
        """Drop a cancelled row's work that has not started."""
        work: list[Any] = [self._encoding, self._decoding]
        for futures in work:
            for future in [future for future, other in futures.items() if other is row]:
                future.cancel()
                del futures[future]

    def poll(self, *, block: bool) -> None:
        """Do a share of the work; `block` waits until one picture is done."""
        self._executor.poll([*self._encoding, *self._decoding], block)

    def encoded(self) -> Iterator[tuple[Row, str | None]]:
        """Rows whose init image is encoded, with the reason where that failed."""
        for future in [future for future in self._encoding if future.done()]:
            row, error = self._encoding.pop(future), future.exception()
            if row.latents is not None and row.latents.is_cuda:
                # Made on the side stream: not to be reused there while a step still reads them.
                row.latents.record_stream(torch.cuda.current_stream(row.latents.device))
            yield row, None if error is None else self._reason(error)

    def decoded(self) -> Iterator[tuple[Row, torch.Tensor | None, Image | None, str | None]]:
        """Rows decoded, with kept pixels and picture, or the reason why not."""
        for future in [future for future in self._decoding if future.done()]:
            row, error = self._decoding.pop(future), future.exception()
            reason = None if error is None else self._reason(error)
            yield (row, None, None, reason) if reason else (row, *future.result(), None)

    def _reason(self, error: BaseException) -> str:
        try:
            return row_reason(error)
        except OutOfMemory as shortage:
            if not self.isolate_oom:
                raise
            return str(shortage)


class _Executor(Protocol):
    """Where the work runs."""

    def submit(self, work: Callable[..., Any], *args: Any) -> Future[Any]: ...
    def poll(self, futures: list[Future[Any]], block: bool) -> None: ...


class _InlineExecutor:
    """In the caller's own thread, one piece at a time, first come first served."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]] = deque()

    def submit(self, work: Callable[..., Any], *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._waiting.append((future, work, args))
        return future

    def poll(self, futures: list[Future[Any]], block: bool) -> None:
        if not self._waiting:
            return
        future, work, args = self._waiting.popleft()
        while future.cancelled() and self._waiting:
            future, work, args = self._waiting.popleft()
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(work(*args))
        except Exception as error:
            future.set_exception(error)


class _SideExecutor:
    """In a thread and a CUDA stream of its own."""

    def __init__(self, device: str):
        self._stream = SideStream(device, "autoencoder")

    def submit(self, work: Callable[..., Any], *args: Any) -> Future[Any]:
        return self._stream.submit_after(work, *args)

    def poll(self, futures: list[Future[Any]], block: bool) -> None:
        if block and futures:
            wait(futures, return_when=FIRST_COMPLETED)


def decode_row(row: Row, keep_pixels: bool = False) -> Decoded:
    """A finished row's picture.

    Once more where memory lacks: what steps have left may be enough, but not in one piece.
    """
    try:
        return _decode(row, keep_pixels)
    except Exception as error:
        if not lacks_memory(error):
            raise
    # Not before: with the error its traceback is gone, and what was computed so far.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return _decode(row, keep_pixels)


def _decode(row: Row, keep_pixels: bool) -> Decoded:
    assert row.latents is not None
    if not torch.isfinite(row.latents).all():
        raise ValueError(NOT_FINITE)
    pixels_CHW = decode_latents(row.latents, row.model)[0]
    if not torch.isfinite(pixels_CHW).all():
        raise ValueError("the decoded picture is not finite (NaN or infinity)")
    if row.inpainting is not None:
        pixels_CHW = row.inpainting.finish(pixels_CHW)
    return pixels_CHW.cpu() if keep_pixels else None, to_image(pixels_CHW)
