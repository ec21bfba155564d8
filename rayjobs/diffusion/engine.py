"""The engine: one model on one device, advancing rows one denoising step at a time.

Owns the life of a row, from request to result. Rows of one UNet call share the weights, the latent
shape and the dtype, and nothing else. Knows nothing of where requests come from.
"""

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import count, islice, product
from time import perf_counter
from typing import Any

import torch
from PIL.Image import Image
from PIL.Image import new as new_image

from rayjobs.diffusion.batcher import Batcher, BatchPolicy
from rayjobs.diffusion.faults import check, row_reason
from rayjobs.diffusion.model import Model
from rayjobs.diffusion.refiner.bank import Refiners
from rayjobs.diffusion.refiner.network import Network
from rayjobs.diffusion.request import SIZE_MULTIPLE, Lora, Request, Result
from rayjobs.diffusion.rows.preparing import Parts, prepare_row
from rayjobs.diffusion.rows.row import Row
from rayjobs.diffusion.vae.latents import decode_latents
from rayjobs.diffusion.vae.preview import Preview, Previewer
from rayjobs.diffusion.vae.worker import VaeWorker

MAX_BATCHES_AHEAD = 3
"""Requests that `generate` draws beyond those of a call, in batches."""


class Engine:
    """Turns requests into images; `max_rows` requests of one size share a UNet call, and more
    where some give a slot back between its calls.

    With `fixed_shape` every UNet call has `slots` slots (by default two for each request, for
    guidance), every text-encoder call `max_rows` and every autoencoder call one: short calls are
    padded and a request's bits do not depend on its neighbours. On CUDA, where its bits depend on
    its slot in a call, each row and each text then has a call of its own: still one step of all
    rows, at 0.8 to 0.85 of the speed at 1024 px (measured on an H200). Without `fixed_shape` calls
    are as large as needed, which saves that and promises a tolerance only. A `batcher` of one's own
    decides who goes into the next call. Where the autoencoder runs out of memory, `isolate_oom`
    lets that row fail alone.
    """

    def __init__(
        self,
        model: Model,
        max_rows: int = 8,
        *,
        slots: int | None = None,
        fixed_shape: bool = True,
        batcher: BatchPolicy[Row] | None = None,
        isolate_oom: bool = False,
    ):
        if max_rows < 1:
            raise ValueError(f"max_rows is {max_rows}; it must be at least 1")
        self.model = model
        build = partial(
            Network, max_rows=max_rows, slots=slots or 2 * max_rows, fixed_shape=fixed_shape
        )
        self._own = own = build(model)
        self.loras, self.controls, self.ip_adapters = own.loras, own.controls, own.ip_adapters
        self.prompts, self._unet_batch = own.prompts, own.unet_batch
        self.refiners = Refiners(model, build)
        self.rows: dict[int, Row] = {}
        self._batcher: BatchPolicy[Row] = Batcher(max_rows) if batcher is None else batcher
        self._traced_s = model.trace_warmup_s  # by this model's other engines
        self._vae = VaeWorker(model, isolate_oom)
        self._previewer = Previewer(model)
        self._failed: list[Result] = []
        self._ids = count()
        self.keep_pixels = False
        """Whether results have the float pixels of pictures that are decoded from now on."""
        self.num_steps, self.step_s = 0, 0.0
        """Steps made, and the time spent in them."""
        self.side_s = 0.0
        """Spent on prompts, and on encoding and decoding pictures; what a GPU does of that beside
        its steps is not counted."""

    @property
    def num_slots(self) -> int:
        """Rows of a UNet call in a fixed shape."""
        return self._unet_batch.num_slots

    @property
    def trace_warmup_s(self) -> float:
        """Seconds spent on recording the UNet, over what those steps take afterwards."""
        return self.model.trace_warmup_s - self._traced_s

    @property
    def num_pending(self) -> int:
        """Requests added and not yet returned."""
        return len(self.rows) + len(self._failed)

    @torch.no_grad()
    def warm(self, sizes: Iterable[tuple[int | None, int | None]] = ((None, None),)) -> None:
        """Compile what the model's options say, for pictures of these widths and heights (None: its
        own): full calls and those of one slot, so that nothing is compiled under a request."""
        if self.model.compiled is None:
            return
        # Two slots too: on a CPU graphs for 16 and more are none for fewer.
        calls = (self._batcher.max_rows, 2.0), (1, 2.0), (1, 1.0)
        with self.model.compiled.warming():
            for (width, height), (number, scale) in product(sizes, calls):
                asked = Request(
                    prompt="",
                    steps=1,
                    guidance_scale=scale,
                    width=width or self.model.default_side,
                    height=height or self.model.default_side,
                    loras=tuple(Lora(path=path, scale=of) for path, of in self.loras.fused),
                    **(_all_masked() if self.model.needs_mask else {}),
                )
                rows = [prepare_row(n, asked, self._parts) for n in range(number)]
                for row in rows:
                    if not row.is_ready:
                        row.encode_init()
                self._predict_noise(rows)
                assert rows[0].latents is not None
                decode_latents(rows[0].latents, self.model)
        self._unet_batch.forget()

    def add(self, request: Request) -> int:
        """Queue a request; it joins at the next step. An invalid one comes back as a failure."""
        row_id = next(self._ids)
        try:
            row = prepare_row(row_id, request, self._parts)
        except Exception as error:  # an invalid request must not stop the others
            reason = row_reason(error)
            self._failed.append(Result(id=row_id, request=request, error=reason))
            return row_id
        self.rows[row_id] = row
        if row.is_ready:
            self._batcher.add(row)
        else:
            self._vae.encode(row)
        return row_id

    def cancel(self, row_id: int) -> bool:
        """Drop a request and free its slots; False when it is unknown or already returned."""
        row = self.rows.pop(row_id, None)
        if row is not None:
            self._batcher.discard(row)
            self._vae.cancel(row)
        return row is not None

    def progress(self, row_id: int) -> tuple[int, int]:
        """UNet calls made for a request and those it takes in all; KeyError when it is not here."""
        return self.rows[row_id].progress

    def preview(self, row_id: int) -> Image | None:
        """What a request's picture looks like by now, one pixel for each latent; None before its
        first step. KeyError when it is not here."""
        preview = self.begin_preview(row_id)
        return None if preview is None else preview.draw()

    @torch.no_grad()
    def begin_preview(self, row_id: int) -> Preview | None:
        """The same to be drawn later, by when a GPU has it ready: to draw it now waits for that."""
        return self._previewer.begin(self.rows[row_id])

    @torch.no_grad()
    def step(self) -> list[Result]:
        """One denoising step of the rows that the batcher chooses; returns finished requests."""
        started_s = perf_counter()
        rows = self._step(started_s)
        results = self._collect()
        self.num_steps += bool(rows)
        self.step_s += perf_counter() - started_s
        return results

    @property
    def _parts(self) -> Parts:
        return Parts(self.model, self.loras, self.controls, self.ip_adapters, self.refiners)

    def _network(self, refiner: str | None) -> Network:
        return self._own if refiner is None else self.refiners.load(refiner)

    def _step(self, started_s: float) -> list[Row]:
        self._vae.poll(block=not len(self._batcher))
        self._join_encoded()
        self.side_s += perf_counter() - started_s
        rows = self._batcher.choose()
        if rows:
            noise = self._predict_noise(rows)
            self._advance(rows, noise)
            self._decode_finished(rows)
        return rows

    def generate(self, requests: Iterable[Request], keep_pixels: bool = False) -> Iterator[Result]:
        """Make all `requests`, drawn from only as slots become free, in the order they finish."""
        self.keep_pixels = keep_pixels
        remaining = iter(requests)
        while True:
            for request in islice(remaining, max(0, self._num_ahead() - self.num_pending)):
                self.add(request)
            if not self.num_pending:
                return
            yield from self.step()

    def _num_ahead(self) -> int:
        """Requests to have at once: more where rows of several shapes wait for calls of their own,
        which would else be half empty."""
        rows = list(self.rows.values())
        shapes = {(row.refiner, row.shape, row.num_chunks, row.reuses) for row in rows}
        room = sum(1 - row.share for row in rows)  # what rows have given back of their slots
        calls = 1 + min(max(1, len(shapes)), MAX_BATCHES_AHEAD)
        return calls * self._batcher.max_rows + int(room)

    def _predict_noise(self, rows: list[Row]) -> list[torch.Tensor]:
        noise: dict[Row, torch.Tensor] = {}
        try:
            for refiner in dict.fromkeys(row.refiner for row in rows):
                mine = [row for row in rows if row.refiner == refiner]
                network = self._network(refiner)
                self._encode_prompts(mine, network)
                noise |= zip(mine, network.unet_batch.predict_noise(mine), strict=True)
        except (RuntimeError, MemoryError) as error:
            check(error)
            raise
        return [noise[row] for row in rows]

    def _join_encoded(self) -> None:
        """Rows whose init image is encoded join the batch; those whose image failed leave."""
        for row, error in self._vae.encoded():
            if row.id not in self.rows:
                continue
            if error is None:
                self._batcher.add(row)
            else:
                self._fail(row, error)

    def _encode_prompts(self, rows: list[Row], network: Network) -> None:
        """Embed the prompts of new rows, and of waiting rows as far as the encoder's batch goes."""
        new = [row for row in rows if row.embeddings is None]
        if not new:
            return
        others = [row for row in self.rows.values() if row.refiner == new[0].refiner]
        waiting = [row for row in others if row.embeddings is None and row not in new]
        new += waiting[: max(0, network.prompts.batch - len(new))]
        texts = [text for row in new for text in row.texts]
        started_s = perf_counter()
        embeddings = iter(network.prompts.encode(texts))
        self.side_s += perf_counter() - started_s
        for row in new:
            row.embeddings = {text: next(embeddings) for text in row.texts}

    def _advance(self, rows: list[Row], noise: list[torch.Tensor]) -> None:
        """One step of each row's own sampler; a row whose sampler cannot go on leaves alone."""
        for row, noise_1CHW in zip(rows, noise, strict=True):
            try:
                row.advance(noise_1CHW)
            except Exception as error:
                self._batcher.discard(row)
                self._fail(row, row_reason(error))

    def _decode_finished(self, rows: list[Row]) -> None:
        """Finished rows leave for the autoencoder: to be decoded, or to begin their next pass."""
        for row in rows:
            if row.is_done and row.id in self.rows:
                self._batcher.discard(row)
                if row.then is None:
                    self._vae.decode(row, self.keep_pixels)
                else:
                    self.rows[row.id] = row.follow()
                    self._vae.encode(row.then)

    def _collect(self) -> list[Result]:
        """Failures and decoded pictures since the last step."""
        results, self._failed = self._failed, []
        for row, pixels_CHW, image, error in self._vae.decoded():
            if self.rows.pop(row.id, None) is None:
                continue
            results.append(row.result(image=image, pixels=pixels_CHW, error=error))
        if not self.rows:
            for network in (self._own, *self.refiners.networks):
                network.unet_batch.forget()
        return results

    def _fail(self, row: Row, reason: str) -> None:
        del self.rows[row.id]
        self._failed.append(row.result(error=reason))


def _all_masked() -> dict[str, Any]:
    """What a request for an inpainting model has beside a plain one's."""
    picture = new_image("RGB", (SIZE_MULTIPLE, SIZE_MULTIPLE), "white")
    return {"init_image": picture, "mask": picture, "strength": 1.0}
