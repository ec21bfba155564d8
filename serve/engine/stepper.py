"""The thread that steps a replica's engines: add requests, choose a model, step, report.

Owns everything that happens between two steps. Changes arrive from the event loop, and events go
back to it. Knows nothing of names, of loading or of HTTP.
"""

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from rayjobs.diffusion.adapters.placed import PlacedAdapter
from rayjobs.diffusion.faults import DeviceLost, OutOfMemory
from rayjobs.diffusion.files.header import first_line
from rayjobs.diffusion.request import Result
from serve.engine.backlog import Backlog
from serve.engine.fairness import FairQueue, RowPriority, Shape
from serve.engine.forecast import Forecast
from serve.engine.models import LoadedModel, ModelCache, ModelMemoryFull
from serve.engine.nets import NetMemoryFull
from serve.engine.pacer import Pacer, StepTiming
from serve.engine.previews import Previews
from serve.engine.request_state import RequestState
from serve.engine.safety import Checks, Safety
from serve.metrics import EngineMetrics
from serve.protocol import Event, Failed, Step, Waiting
from serve.registry import Weights

BROKEN = Failed("broken", "the engine has failed")
WAITING_EVERY_S = 0.5
"""Time between two waiting events of a request."""


class Stepper:
    """Steps the engines in a thread of its own; requests are submitted from the event loop."""

    def __init__(
        self, models: ModelCache, forecast: Forecast, metrics: EngineMetrics, safety: Safety | None
    ):
        self.models = models
        self.forecast = forecast
        self.metrics = metrics
        self.backlog = Backlog(models, forecast)
        self.failure: BaseException | None = None
        """What ended the thread; the process must then be replaced."""
        self._loop = asyncio.get_running_loop()
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Event()
        self._checks = Checks(safety, self._wake.set)
        self._closing = False
        self._owners: dict[tuple[LoadedModel, int], RequestState] = {}
        self._queue: FairQueue[Weights] = FairQueue()
        self._pacer = Pacer()
        self._previews = Previews(self._send)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # Called by the event loop.

    def submit(self, state: RequestState, adapters: list[PlacedAdapter]) -> None:
        """Start a request at the next step, after its adapters are loaded."""
        self.backlog.states[state] = None
        self._post(lambda: self._enter(state, adapters))
        if self.failure is not None:
            self._send(state, state.fail(BROKEN))

    def withdraw(self, state: RequestState) -> None:
        """Remove a request's rows before the next step, whether it is finished or not."""
        self._post(lambda: self._leave(state))

    async def close(self) -> None:
        self._closing = True
        self._wake.set()
        await asyncio.to_thread(self._thread.join)

    def _post(self, change: Callable[[], None]) -> None:
        self._inbox.append(change)
        self._wake.set()

    # In the engine's thread.

    def _run(self) -> None:
        try:
            while not self._closing:
                self._run_once()
        except BaseException as error:
            self.failure = error
            for state in list(self.backlog.states):
                self._send(state, state.fail(BROKEN))

    def _run_once(self) -> None:
        self._wake.clear()
        while self._inbox:
            self._inbox.popleft()()
        self._checks.report()
        self._report_waiting()
        self._detach_evicted()
        num_images = sum(len(state.images) for state in list(self.backlog.states))
        self.metrics.set_load(self.backlog.pending_s(), num_images)
        busy = {each.weights: each for each in self._loaded() if each.engine.num_pending}
        if busy:
            self._step(busy[self._queue.order(busy)[0]])
        elif not self._closing:
            self._settle()
            self._wake.wait()

    def _loaded(self) -> list[LoadedModel]:
        return list(self.models.loaded.values())

    def _enter(self, state: RequestState, adapters: list[PlacedAdapter]) -> None:
        if state.over:
            return
        try:
            self._admit(state, adapters)
            self._add(state)
        except DeviceLost:
            raise
        except (ModelMemoryFull, NetMemoryFull) as error:
            self._end(state, Failed("busy", str(error), None, max(5.0, self.backlog.pending_s())))
        except Exception as error:  # one bad request must not stop the others
            self._end(state, Failed("invalid", first_line(error)))

    def _add(self, state: RequestState) -> None:
        work_s = self.backlog.work_s(replace(state.request, seeds=(0,)), state.loaded.weights)
        for image, engine_request in enumerate(state.engine_requests()):
            priority = RowPriority(state.request.caller, state.arrived_s, work_s)
            state.loaded.batcher.priorities[engine_request] = priority
            row_id = state.loaded.engine.add(engine_request)
            self._owners[state.loaded, row_id] = state
            row = state.loaded.engine.rows.get(row_id)
            if row is None:
                state.images[row_id] = image  # its failure comes with the next step
            else:
                state.enter(row_id, image, row)

    def _admit(self, state: RequestState, adapters: list[PlacedAdapter]) -> None:
        """Load the adapters read for a request, and those evicted since it was prepared."""
        state.loaded.controls.admit(state.controls)
        state.loaded.ip_adapters.admit(state.ip_adapters)
        in_use = {lora.path for other in list(self.backlog.states) for lora in other.loras}
        for adapter in adapters:
            self.models.admit(state.loaded, adapter, in_use)
        for lora in state.loras:
            if lora.path not in state.loaded.adapters:
                loras = state.loaded.engine.loras
                self.models.admit(state.loaded, loras.place(loras.read(lora.path)), in_use)
            state.loaded.adapters[lora.path].used_s = time.monotonic()

    def _leave(self, state: RequestState) -> None:
        """Remove a request and its rows."""
        if state.images and not state.over:
            self.metrics.cancelled(len(state.images))
        state.over = True
        for row_id in list(state.images):
            row = state.loaded.engine.rows.get(row_id)
            if row is not None:
                state.loaded.batcher.priorities.pop(row.request, None)
            state.loaded.engine.cancel(row_id)
            self._owners.pop((state.loaded, row_id), None)
            state.leave(row_id)
        if state in self.backlog.states:
            del self.backlog.states[state]
            self._on_loop(self.models.release, state.loaded)

    def _report_waiting(self) -> None:
        now_s = time.monotonic()
        for position, state in enumerate(list(self.backlog.states)):
            if self._is_waiting_event_due(state, now_s):
                state.notified_s = now_s
                self._send(state, Waiting(position, self.backlog.until_started_s(state)))

    def _is_waiting_event_due(self, state: RequestState, now_s: float) -> bool:
        """Everybody is told once, when the engine has taken the rows; again where it is wanted."""
        if state.started or state.over or not state.left:
            return False
        if state.notified_s is None:
            return True
        return state.request.progress and now_s - state.notified_s > WAITING_EVERY_S

    def _step(self, loaded: LoadedModel) -> None:
        engine, batcher = loaded.engine, loaded.batcher
        vae_s, trace_warmup_s = engine.side_s, engine.trace_warmup_s
        is_decoding = self._uses_autoencoder()
        batcher.usage = None
        started_s = time.monotonic()
        self._pacer.begin()
        results: list[Result] | None = None
        try:
            results = engine.step()
        except OutOfMemory:
            pass  # while it is handled, it holds the tensors of the call
        except DeviceLost:
            raise
        except Exception as error:  # which row caused it is unknown
            self._fail_batch(loaded, error)
            return
        if results is None:
            self._shrink(loaded)
            return
        step_s = time.monotonic() - started_s
        self._trace(loaded, step_s, engine.side_s - vae_s)
        for row in batcher.chosen:
            self._report_progress(loaded, row.id)
        self._previews.send()
        for result in results:
            self._check(loaded, result)
        self._checks.report()
        memory = self._pacer.memory()
        is_decoding = is_decoding or self._uses_autoencoder()
        if memory is not None:
            self._observe_memory(loaded, memory, is_decoding)
        step = StepTiming(
            loaded=loaded,
            usage=batcher.usage,
            vae_s=engine.side_s - vae_s,
            trace_warmup_s=engine.trace_warmup_s - trace_warmup_s,
            num_results=len(results),
        )
        for over, seconds in self._pacer.end(step):
            self._learn(over, seconds - over.trace_warmup_s)
        self._previews.send()

    def _settle(self) -> None:
        """End what the last step left behind: it would keep its model in memory."""
        for over, seconds in self._pacer.finish():
            self._learn(over, seconds - over.trace_warmup_s)
        self._previews.send()

    def _uses_autoencoder(self) -> bool:
        """Whether init images wait to be encoded, or finished rows to be decoded."""
        rows = (row for loaded in self._loaded() for row in loaded.engine.rows.values())
        return any(row.is_done or not row.is_ready for row in rows)

    def _observe_memory(
        self, loaded: LoadedModel, memory: tuple[float, float], is_decoding: bool
    ) -> None:
        """Memory that the autoencoder used beside a batch says nothing about the batch's slots, nor
        does that of a batch in which deep features are reused."""
        used_bytes, self.forecast.free_bytes = memory
        usage = loaded.batcher.usage
        if usage is not None and usage.is_plain and not is_decoding:
            self.forecast.observe_memory(loaded.key(usage.shape), usage.slots, used_bytes)

    def _learn(self, step: StepTiming, seconds: float) -> None:
        """Account for a step, once its time on the device is known."""
        loaded, usage = step.loaded, step.usage
        self._queue.charge(loaded.weights, seconds)
        loaded.vae_s += step.vae_s
        if usage is not None:
            loaded.batcher.charge(usage, seconds)
            loaded.shape = usage.shape
            if usage.is_plain:
                step_s = seconds - step.vae_s
                self.forecast.observe_step(loaded.key(usage.shape), usage.slots, step_s)
            self.metrics.stepped(loaded.weights.uri, usage.rows, seconds)
            self._end_too_long(loaded, usage.shape)
        if step.num_results and loaded.shape:
            self.forecast.observe_image(loaded.key(loaded.shape), loaded.vae_s / step.num_results)
            loaded.vae_s = 0.0

    def _end_too_long(self, loaded: LoadedModel, shape: Shape) -> None:
        """End requests whose steps turn out to take longer than others may wait."""
        for state in [s for s in self.backlog.states if s.loaded is loaded and s.shape == shape]:
            failed = None if state.over else self.backlog.too_long(loaded, shape, state.slots)
            if failed is not None:
                self._end(state, failed)

    def _fail_batch(self, loaded: LoadedModel, error: Exception) -> None:
        """End the requests whose rows were in a batch that failed."""
        for row in list(loaded.batcher.chosen):
            state = self._owners.get((loaded, row.id))
            if state is not None:
                self._end(state, Failed("broken", f"a step failed: {first_line(error)}"))

    def _shrink(self, loaded: LoadedModel) -> None:
        """Continue with smaller batches; a single row that does not fit never will."""
        rows = loaded.batcher.chosen
        self._pacer.clear()
        if len(rows) > 1:
            key = loaded.key(rows[0].shape)
            self.forecast.observe_oom(key, sum(row.num_slots for row in rows))
            return
        message = "the image does not fit the device's memory; request a smaller size"
        for row in rows:
            state = self._owners.get((loaded, row.id))
            if state is not None:
                self._end(state, Failed("invalid", message, "size"))

    def _trace(self, loaded: LoadedModel, step_s: float, side_s: float) -> None:
        """Tell the requests of a step's rows where they are; several rows of one share stages."""
        chosen = loaded.batcher.chosen
        owners = {self._owners.get((loaded, row.id)): row for row in chosen}
        for state, row in owners.items():
            if state is not None and not state.over:
                if not state.started:
                    state.stages.enter("denoise", ago_s=step_s)
                state.stages.note("step", done=row.sampler.position, rows=len(chosen))
                if row.is_done:
                    state.stages.enter("decode", ago_s=side_s)

    def _report_progress(self, loaded: LoadedModel, row_id: int) -> None:
        state = self._owners.get((loaded, row_id))
        if state is None or row_id not in loaded.engine.rows:
            return
        if not state.started:
            state.started = True
            self.metrics.started(time.monotonic() - state.arrived_s)
        done, total = loaded.engine.progress(row_id)
        state.left[row_id] = loaded.engine.rows[row_id].slots_left
        image = state.images[row_id]
        if state.request.progress:
            since_s = time.monotonic() - state.arrived_s
            self._send(state, Step(image, done, total, (total - done) * since_s / done))
        self._previews.begin(state, row_id, done)

    def _check(self, loaded: LoadedModel, result: Result) -> None:
        loaded.batcher.priorities.pop(result.request, None)
        state = self._owners.pop((loaded, result.id), None)
        if state is not None and not state.over:
            self._checks.put(result.image, partial(self._report_result, state, result))

    def _report_result(self, state: RequestState, result: Result, is_safe: bool) -> None:
        if state.over:
            return
        if result.image is None:
            self._end(state, Failed("invalid", str(result.error)))
        elif not is_safe:
            refusal = "the safety checker blocked the image; change the prompt"
            self._end(state, Failed("refused", refusal, "prompt"))
        else:
            self.metrics.made(state.loaded.weights.uri)
            self._send(state, state.finish(result.id, result.image, result.warnings))

    def _detach_evicted(self) -> None:
        """Detach the adapters of evicted models from the parts that other models share."""
        while self.models.leaving:
            self.models.leaving.popleft().engine.loras.detach()

    def _end(self, state: RequestState, failed: Failed) -> None:
        self._send(state, state.fail(failed))
        self._leave(state)

    def _send(self, state: RequestState, event: Event) -> None:
        self._on_loop(state.events.put_nowait, event)

    def _on_loop(self, work: Callable[..., None], *args: object) -> None:
        with contextlib.suppress(
            RuntimeError
        ):  # the event loop is closed, and its callers are gone
            self._loop.call_soon_threadsafe(work, *args)
