"""Work beside the steps, in a thread of its own: encoding init images, decoding finished latents.

Owns that thread and, on a GPU, its stream, so that no step waits for the autoencoder. Knows nothing
of batching.
"""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

import torch
from PIL.Image import Image

from rayjobs.diffusion.latents import decode_latents, to_image
from rayjobs.diffusion.model import Model
from rayjobs.diffusion.row import Row

NOT_FINITE = "the latents are not finite (NaN or infinity)"


class Side:
    """One thread; every call takes one picture, so that its shape never varies."""

    def __init__(self, model: Model):
        self.model = model
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="autoencoder")
        self._encoding: dict[Future[None], Row] = {}
        self._decoding: dict[Future[tuple[torch.Tensor, Image]], Row] = {}
        cuda = model.device.startswith("cuda")
        self._stream = torch.cuda.Stream(model.device) if cuda else None

    @property
    def is_decoding(self) -> bool:
        return bool(self._decoding)

    def encode(self, row: Row) -> None:
        self._encoding[self._submit(row.encode_init, self.model)] = row

    def decode(self, row: Row) -> None:
        self._decoding[self._submit(_decode, row, self.model)] = row

    def encoded(self, wait: bool) -> Iterator[tuple[Row, str | None]]:
        """Rows whose init image is encoded, with the reason where that failed."""
        for future in _finished(self._encoding, wait):
            error = future.exception()
            yield self._encoding.pop(future), None if error is None else str(error)

    def decoded(
        self, wait: bool
    ) -> Iterator[tuple[Row, torch.Tensor | None, Image | None, str | None]]:
        """Rows decoded, with pixels and picture, or the reason why not."""
        for future in _finished(self._decoding, wait):
            row, error = self._decoding.pop(future), future.exception()
            yield (row, None, None, str(error)) if error else (row, *future.result(), None)

    def _submit(self, work: Callable[..., Any], *args: Any) -> Future[Any]:
        event = torch.cuda.current_stream().record_event() if self._stream else None
        return self._thread.submit(self._run, event, work, *args)

    @torch.no_grad()
    def _run(self, event: Any, work: Callable[..., Any], *args: Any) -> Any:
        """On a GPU: after what was queued when the work was handed over, and to its end."""
        stream = self._stream
        with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
            if stream:
                stream.wait_event(event)
            result = work(*args)
            if stream:
                stream.synchronize()
            return result


def _decode(row: Row, model: Model) -> tuple[torch.Tensor, Image]:
    assert row.latents is not None
    if not torch.isfinite(row.latents).all():
        raise ValueError(NOT_FINITE)
    pixels_CHW = decode_latents(row.latents, model)[0]
    if not torch.isfinite(pixels_CHW).all():
        raise ValueError("the decoded picture is not finite (NaN or infinity)")
    return pixels_CHW, to_image(pixels_CHW)


def _finished(futures: dict[Future[Any], Row], wait_for_one: bool) -> list[Future[Any]]:
    if wait_for_one and futures:
        wait(futures, return_when=FIRST_COMPLETED)
    return [future for future in futures if future.done()]
