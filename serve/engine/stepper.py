"""The thread that steps a replica's engines: take in, expire, choose a model, step, tell.

Owns the turn and all that must happen between two steps. Changes come in from the event loop,
events go back to it. Knows nothing of names, of loading or of HTTP.
"""

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace

from PIL.Image import Image

from rayjobs.diffusion.faults import DeviceLost, OutOfMemory
from rayjobs.diffusion.lora import Adapter
from rayjobs.diffusion.request import Result
from rayjobs.diffusion.weights import first_line
from serve.engine.fairness import Ticket, Turns
from serve.engine.forecast import Forecast, Key
from serve.engine.job import Job, estimate
from serve.engine.models import Loaded, Models
from serve.engine.pacer import Made, Pacer
from serve.engine.safety import Safety
from serve.images import to_pixels
from serve.metrics import EngineMetrics
from serve.protocol import Ask, Event, Failed, Partial, Step, Waiting
from serve.registry import Weights

BROKEN = Failed("broken", "the engine has failed")
TELL_EVERY_S = 0.5
"""How often one who waits hears of it."""


class Stepper:
    """Everything below `submit` runs in its own thread."""

    def __init__(
        self, models: Models, forecast: Forecast, metrics: EngineMetrics, safety: Safety | None
    ):
        self.models = models
        self.forecast = forecast
        self.metrics = metrics
        self.jobs: dict[Job, None] = {}
        """In the order of their coming."""
        self.failure: BaseException | None = None
        """What ended the thread: the process must be replaced."""
        self._safety = safety
        self._loop = asyncio.get_running_loop()
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Event()
        self._closing = False
        self._owners: dict[tuple[Loaded, int], Job] = {}
        self._turns: Turns[Weights] = Turns()
        self._pacer = Pacer()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # Called by the event loop.

    def submit(self, job: Job, adapters: list[Adapter]) -> None:
        """Have a job worked on from the next step; adapters that it needs are put in before."""
        self.jobs[job] = None
        self._ask(lambda: self._enter(job, adapters))
        if self.failure is not None:
            self._tell(job, job.fail(BROKEN))

    def withdraw(self, job: Job) -> None:
        """Have a job's rows out by the next step, whether it is finished or not."""
        self._ask(lambda: self._leave(job))

    async def close(self) -> None:
        self._closing = True
        self._wake.set()
        await asyncio.to_thread(self._thread.join)

    def work_s(self, ask: Ask, weights: Weights) -> float:
        """Seconds of work of an ask that the engine has not seen."""
        loaded = self.models.loaded.get(weights)
        side, scale = 1024, 8
        if loaded is not None:
            side, scale = loaded.engine.model.default_side, loaded.engine.model.vae_scale
        shape, place_steps = estimate(ask, side, scale)
        return self.forecast.work_s((weights, shape), place_steps, len(ask.seeds))

    def pending_s(self) -> float:
        """Seconds until all jobs are done, in calls as full as these jobs make them."""
        total, by_key = 0.0, dict[Key, list[tuple[int, int]]]()
        for job in list(self.jobs):
            if job.left and not job.over:
                rows = by_key.setdefault(job.loaded.key(job.shape), [])
                rows += [(left // job.places, job.places) for left in list(job.left.values())]
            elif not job.over:
                total += self.work_s(job.ask, job.loaded.weights)
        return total + sum(self.forecast.drain_s(key, rows) for key, rows in by_key.items())

    def _ask(self, change: Callable[[], None]) -> None:
        self._inbox.append(change)
        self._wake.set()

    # In the engine's thread.

    def _run(self) -> None:
        try:
            while not self._closing:
                self._turn()
        except BaseException as error:
            self.failure = error
            for job in list(self.jobs):
                self._tell(job, job.fail(BROKEN))

    def _turn(self) -> None:
        while self._inbox:
            self._inbox.popleft()()
        self._expire()
        self._sweep()
        self.metrics.state(self.pending_s(), sum(len(job.images) for job in list(self.jobs)))
        busy = {each.weights: each for each in self._loaded() if each.engine.num_pending}
        if busy:
            self._step(busy[self._turns.order(busy)[0]])
        else:
            self._sleep()

    def _loaded(self) -> list[Loaded]:
        return list(self.models.loaded.values())

    def _sleep(self) -> None:
        """Until something comes in, or the next deadline."""
        next_s = min((job.deadline_s for job in list(self.jobs)), default=float("inf"))
        wait_s = None if next_s == float("inf") else max(0.0, next_s - time.monotonic())
        if not self._inbox:
            self._wake.wait(wait_s)
        self._wake.clear()

    def _enter(self, job: Job, adapters: list[Adapter]) -> None:
        if job.over:
            return
        try:
            self._admit(job, adapters)
            self._add(job)
        except DeviceLost:
            raise
        except Exception as error:  # whatever is wrong with one ask, the others go on
            self._end(job, Failed("invalid", first_line(error)))

    def _add(self, job: Job) -> None:
        work_s = self.work_s(replace(job.ask, seeds=(0,)), job.loaded.weights)
        for image, request in enumerate(job.requests()):
            ticket = Ticket(job.ask.caller, job.arrived_s, work_s)
            job.loaded.batcher.tickets[request] = ticket
            row_id = job.loaded.engine.add(request)
            self._owners[job.loaded, row_id] = job
            row = job.loaded.engine.rows.get(row_id)
            if row is None:
                job.images[row_id] = image  # its failure comes with the next step
            else:
                job.enter(row_id, image, row)

    def _admit(self, job: Job, adapters: list[Adapter]) -> None:
        """Put in the adapters that were read for a job, and those that had to leave meanwhile."""
        in_use = {lora.path for other in list(self.jobs) for lora in other.loras}
        for adapter in adapters:
            self.models.admit(job.loaded, adapter, in_use)
        for lora in job.loras:
            if lora.path not in job.loaded.adapters:
                read = job.loaded.engine.loras.read(lora.path)
                self.models.admit(job.loaded, read, in_use)

    def _leave(self, job: Job) -> None:
        """Take a job out; its rows are gone before the next step."""
        if job.images and not job.over:
            self.metrics.cancelled(len(job.images))
        job.over = True
        for row_id in list(job.images):
            row = job.loaded.engine.rows.get(row_id)
            if row is not None:
                job.loaded.batcher.tickets.pop(row.request, None)
            job.loaded.engine.cancel(row_id)
            self._owners.pop((job.loaded, row_id), None)
            job.leave(row_id)
        if job in self.jobs:
            del self.jobs[job]
            self._on_loop(self.models.release, job.loaded)

    def _expire(self) -> None:
        now_s = time.monotonic()
        for place, job in enumerate(list(self.jobs)):
            if not job.over and job.deadline_s <= now_s:
                self.metrics.expired()
                self._end(job, too_late())
            elif job.ask.progress and not job.started and now_s - job.told_s > TELL_EVERY_S:
                job.told_s = now_s
                self._tell(job, Waiting(place, self._until_started_s(job)))

    def _until_started_s(self, job: Job) -> float:
        """Rows beyond those that fit begin when rows before them have left their places."""
        at_work = [other for other in list(self.jobs) if other.left]
        shapes = len({(other.loaded.weights, other.shape) for other in at_work})
        same = [other for other in at_work if other.shape == job.shape]
        key = job.loaded.key(job.shape)
        round_s = max(1, shapes) * self.forecast.step_s(key, self.forecast.bound(key))
        before = [other for other in same if other.arrived_s < job.arrived_s]
        beyond = sum(len(o.left) for o in before) + len(job.left) - self.models.config.max_rows
        if beyond <= 0 or not before:
            return round_s
        places = sum(o.place_steps for o in before) / sum(len(o.left) for o in before)
        return round_s * (places / 2) * beyond / self.models.config.max_rows

    def _step(self, loaded: Loaded) -> None:
        engine, batcher = loaded.engine, loaded.batcher
        side_s, trace_warmup_s = engine.side_s, engine.trace_warmup_s
        batcher.receipt = None
        self._pacer.begin()
        try:
            results = engine.step()
        except OutOfMemory:
            self._shrink(loaded)
            return
        except DeviceLost:
            raise
        except Exception as error:  # no row is known to be the guilty one
            self._drop(loaded, error)
            return
        for row in batcher.chosen:
            self._tell_progress(loaded, row.id)
        for result in results:
            self._tell_result(loaded, result)
        side_s, trace_warmup_s = engine.side_s - side_s, engine.trace_warmup_s - trace_warmup_s
        made = Made(loaded, batcher.receipt, side_s, trace_warmup_s, len(results))
        for step, seconds in self._pacer.end(made):
            self._learn(step, seconds - step.trace_warmup_s)

    def _learn(self, step: Made, seconds: float) -> None:
        """Charge and remember a step, once it is known how long it took."""
        loaded, receipt = step.loaded, step.receipt
        self._turns.charge(loaded.weights, seconds)
        loaded.side_s += step.side_s
        if receipt is not None:
            loaded.batcher.charge(receipt, seconds)
            loaded.shape = receipt.shape
            used_bytes, self.forecast.free_bytes = self._pacer.memory()
            step_s = seconds - step.side_s
            self.forecast.saw_step(loaded.key(loaded.shape), receipt.places, step_s, used_bytes)
            self.metrics.stepped(loaded.weights.uri, receipt.rows, seconds)
        if step.num_results and loaded.shape:
            self.forecast.saw_image(loaded.key(loaded.shape), loaded.side_s / step.num_results)
            loaded.side_s = 0.0

    def _drop(self, loaded: Loaded, error: Exception) -> None:
        """End the jobs whose rows were in a call that failed."""
        for row in list(loaded.batcher.chosen):
            job = self._owners.get((loaded, row.id))
            if job is not None:
                self._end(job, Failed("broken", f"a step has failed: {first_line(error)}"))

    def _shrink(self, loaded: Loaded) -> None:
        """Go on with smaller calls; a call of one row that does not fit never will."""
        rows = loaded.batcher.chosen
        self._pacer.clear()
        if len(rows) > 1:
            key = loaded.key(rows[0].shape)
            self.forecast.ran_out(key, sum(row.num_slots for row in rows))
            return
        message = "the picture does not fit the device's memory; ask for a smaller one"
        for row in rows:
            job = self._owners.get((loaded, row.id))
            if job is not None:
                self._end(job, Failed("invalid", message, "size"))

    def _tell_progress(self, loaded: Loaded, row_id: int) -> None:
        job = self._owners.get((loaded, row_id))
        if job is None or row_id not in loaded.engine.rows:
            return
        if not job.started:
            job.started = True
            self.metrics.started(time.monotonic() - job.arrived_s)
        done, total = loaded.engine.progress(row_id)
        job.left[row_id] = (total - done) * loaded.engine.rows[row_id].num_slots
        image = job.images[row_id]
        if job.ask.progress:
            since_s = time.monotonic() - job.arrived_s
            self._tell(job, Step(image, done, total, (total - done) * since_s / done))
        owed = job.owed[row_id]
        if owed and done >= owed[0]:
            index = job.num_partials - len(owed)
            owed.pop(0)
            with contextlib.suppress(RuntimeError):  # a preview less is no harm
                preview = loaded.engine.preview(row_id)
                if preview is not None:
                    self._tell(job, Partial(image, index, to_pixels(preview)))

    def _tell_result(self, loaded: Loaded, result: Result) -> None:
        loaded.batcher.tickets.pop(result.request, None)
        job = self._owners.pop((loaded, result.id), None)
        if job is None or job.over:
            return
        if result.image is None:
            self._end(job, Failed("invalid", str(result.error)))
        elif not self._is_safe(result.image):
            refusal = "the safety checker holds the picture back; change the prompt"
            self._end(job, Failed("refused", refusal, "prompt"))
        else:
            self.metrics.made(loaded.weights.uri)
            self._tell(job, job.finish(result.id, result.image, result.warnings))

    def _is_safe(self, image: Image) -> bool:
        """A checker that cannot say is taken for a no."""
        try:
            return self._safety is None or self._safety.allows(image)
        except RuntimeError:
            return False

    def _sweep(self) -> None:
        """Have models that were evicted leave what they share."""
        while self.models.leaving:
            self.models.leaving.popleft().engine.loras.detach()

    def _end(self, job: Job, failed: Failed) -> None:
        self._tell(job, job.fail(failed))
        self._leave(job)

    def _tell(self, job: Job, event: Event) -> None:
        self._on_loop(job.events.put_nowait, event)

    def _on_loop(self, work: Callable[..., None], *args: object) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop is gone, and its callers with it
            self._loop.call_soon_threadsafe(work, *args)


def too_late() -> Failed:
    return Failed("deadline", "the deadline has passed before the pictures were made", "deadline_s")
