"""The engines of a replica, stepped in a thread of their own; asks come in, events go out.

Owns the turn: take in, expire, choose a model, step, tell. Requests join and leave between two
steps. Knows nothing of HTTP or of Ray.
"""

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import torch

from rayjobs.config import BadInput
from rayjobs.diffusion.faults import OutOfMemory
from rayjobs.diffusion.lora import Adapter
from rayjobs.diffusion.request import Lora, Result
from rayjobs.storage import StorageError
from serve.config import EngineConfig
from serve.fairness import Ticket, Turns
from serve.forecast import Forecast
from serve.images import to_pixels
from serve.job import Job, estimate
from serve.metrics import EngineMetrics
from serve.models import Loaded, Models, NoRoom
from serve.protocol import Ask, Event, Failed, Finished, Partial, Step, Waiting
from serve.registry import Registry, Weights
from serve.safety import Safety

TELL_EVERY_S = 0.5
LAG_EVERY_S = 0.1


class EngineLoop:
    """Answers asks with events. Made and used on one event loop."""

    def __init__(
        self,
        config: EngineConfig,
        registry: Registry,
        metrics: EngineMetrics | None = None,
        safety: Safety | None = None,
    ):
        self.config = config
        self.registry = registry
        self.metrics = metrics or EngineMetrics()
        self.forecast = Forecast(2 * config.max_rows, config.max_step_s)
        self.models = Models(config, self.forecast, self.metrics.saw_load)
        self.failure: BaseException | None = None
        """What ended the engine's thread: the process must be replaced."""
        self._safety = safety
        self._loop = asyncio.get_running_loop()
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Event()
        self._closing = False
        self._jobs: dict[Job, None] = {}
        self._coming: dict[Ask, float] = {}
        """Seconds of work of asks whose model or adapters are being loaded."""
        self._owners: dict[tuple[Loaded, int], Job] = {}
        self._turns: Turns[Weights] = Turns()
        self._pacer = _Pacer()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
        self._lag = self._loop.create_task(self._watch_lag())

    # On the event loop.

    async def generate(self, ask: Ask) -> AsyncIterator[Event]:
        """What becomes of an ask, to its last image or its failure; leaving early ends its rows."""
        self.metrics.asked(ask)
        arrived_s, job, outcome = time.monotonic(), None, "cancelled"
        try:
            async with asyncio.timeout(ask.deadline_s):
                job = await self._prepare(ask, arrived_s)
            if isinstance(job, Failed):
                outcome = job.kind
                yield job
                return
            self._tell_engine(lambda: self._enter(job))
            left = len(ask.seeds)
            while left:
                event = await job.events.get()
                left -= isinstance(event, Finished)
                if isinstance(event, Failed):
                    left, outcome = 0, event.kind
                elif not left:
                    outcome = "ok"
                yield event
        except TimeoutError:
            outcome = "deadline"
            yield _too_late()
        finally:
            if isinstance(job, Job):
                self._tell_engine(lambda: self._withdraw(job))
            self.metrics.answered(ask, outcome, time.monotonic() - arrived_s)

    def pending_s(self) -> float:
        """Seconds until all that is here now is done."""
        return sum(self._left_s(job) for job in list(self._jobs)) + sum(self._coming.values())

    def names(self) -> list[str]:
        """Names of models and adapters that are in memory."""
        held = self.models.loaded
        adapters = {uri for loaded in held.values() for uri in loaded.uris}
        return [
            entry.name
            for entry in self.registry.entries()
            if (entry.weights in held if entry.lora is None else entry.lora in adapters)
        ]

    def position_of(self, job: Job) -> int:
        return sum(other.arrived_s < job.arrived_s for other in list(self._jobs))

    async def warm_up(self, name: str) -> None:
        """Load a model and make a picture with it, so that the first caller finds it warm."""
        ask = Ask(id="warm-up", caller="", model=name, prompt="", steps=2)
        async for event in self.generate(ask):
            if isinstance(event, Failed):
                raise BadInput(f"model {name}: {event.message}")

    async def close(self) -> None:
        self._closing = True
        self._wake.set()
        self._lag.cancel()
        await asyncio.to_thread(self._thread.join)

    async def _prepare(self, ask: Ask, arrived_s: float) -> Job | Failed:
        """A job with its model held and its adapters read, or why there is none."""
        entry = await asyncio.to_thread(self.registry.find, ask.model)
        if entry is None or entry.weights is None:
            return Failed("invalid", f"the model {ask.model!r} does not exist", "model")
        refused = self._refuse(ask, entry.weights)
        if refused is not None:
            return refused
        self._coming[ask] = self._work_s(ask, entry.weights)
        loaded = None
        try:
            loaded = await self.models.hold(entry.weights)
            own = [] if entry.lora is None else [(entry.lora, 1.0)]
            uris = own + [(self._adapter(name), scale) for name, scale in ask.loras]
            read = [(await self.models.read_adapter(loaded, uri), scale) for uri, scale in uris]
        except (BadInput, StorageError) as error:
            return self._given_up(loaded, Failed("invalid", str(error), "model"))
        except NoRoom as error:
            return Failed("busy", str(error), None, max(1.0, self.pending_s()))
        except BaseException:
            self._given_up(loaded, None)
            raise
        finally:
            self._coming.pop(ask, None)
        found = [(r.path if isinstance(r, Adapter) else r, scale) for r, scale in read]
        job = Job(ask, loaded, asyncio.Queue(), tuple(Lora(path=p, scale=s) for p, s in found))
        job.arrived_s = arrived_s
        self._jobs[job] = None
        new = [adapter for adapter, _ in read if isinstance(adapter, Adapter)]
        self._tell_engine(lambda: self._admit(job, new))
        return job

    def _refuse(self, ask: Ask, weights: Weights) -> Failed | None:
        """A full replica's answer: come again when what waits now is done."""
        pending_s = self.pending_s()
        if not pending_s or pending_s + self._work_s(ask, weights) <= self.config.max_pending_s:
            return None
        return Failed("busy", "too many requests are waiting", None, pending_s)

    def _work_s(self, ask: Ask, weights: Weights) -> float:
        loaded = self.models.loaded.get(weights)
        side, channels, scale = 1024, 4, 8
        if loaded is not None:
            model = loaded.engine.model
            side, channels, scale = model.default_side, 4, model.vae_scale
        shape, place_steps = estimate(ask, side, channels, scale)
        return self.forecast.work_s((weights, shape), place_steps, len(ask.seeds))

    def _left_s(self, job: Job) -> float:
        if not job.left:
            return self._work_s(job.ask, job.loaded.weights)
        key = job.loaded.key(job.shape)
        return self.forecast.work_s(key, job.place_steps, len(job.left))

    def _adapter(self, name: str) -> str:
        entry = self.registry.find(name)
        if entry is None or entry.lora is None:
            raise BadInput(f"the LoRA {name!r} does not exist")
        return entry.lora

    def _given_up(self, loaded: Loaded | None, failed: Failed | None) -> Failed | None:
        if loaded is not None:
            self.models.release(loaded)
        return failed

    def _tell_engine(self, change: Callable[[], None]) -> None:
        self._inbox.append(change)
        self._wake.set()

    async def _watch_lag(self) -> None:
        """How late the event loop is: what a caller's bytes wait for besides the network."""
        while True:
            before_s = time.monotonic()
            await asyncio.sleep(LAG_EVERY_S)
            self.metrics.lag(time.monotonic() - before_s - LAG_EVERY_S)

    # In the engine's thread.

    def _run(self) -> None:
        try:
            while not self._closing:
                self._turn()
        except BaseException as error:
            self.failure = error
            failed = Failed("broken", f"the engine has failed: {type(error).__name__}")
            for job in list(self._jobs):
                self._tell(job, job.fail(failed))

    def _turn(self) -> None:
        while self._inbox:
            self._inbox.popleft()()
        self._expire()
        busy = [each for each in self.models.loaded.values() if each.engine.num_pending]
        self.metrics.state(self.pending_s(), sum(len(job.images) for job in self._jobs))
        if not busy:
            deadlines = [job.deadline_s for job in self._jobs]
            wait_s = min(deadlines, default=float("inf")) - time.monotonic()
            if not self._inbox:
                self._wake.wait(None if wait_s == float("inf") else max(0.0, wait_s))
            self._wake.clear()
            return
        by_weights = {each.weights: each for each in busy}
        self._step(by_weights[self._turns.order(by_weights)[0]])

    def _admit(self, job: Job, adapters: list[Adapter]) -> None:
        in_use = {lora.path for other in self._jobs for lora in other.loras}
        in_use |= {lora.path for lora in job.loras}
        for adapter in adapters:
            try:
                self.models.admit(job.loaded, adapter, in_use)
            except ValueError as error:
                self._tell(job, job.fail(Failed("invalid", str(error), "loras")))

    def _enter(self, job: Job) -> None:
        if job.over:
            return
        weights = job.loaded.weights
        for image, request in enumerate(job.requests()):
            work_s = self._work_s(replace(job.ask, seeds=(0,)), weights)
            ticket = Ticket(job.ask.caller, job.arrived_s, work_s)
            job.loaded.batcher.tickets[request] = ticket
            row_id = job.loaded.engine.add(request)
            self._owners[job.loaded, row_id] = job
            row = job.loaded.engine.rows.get(row_id)
            if row is None:
                job.images[row_id] = image  # its failure comes with the next step
            else:
                job.enter(row_id, image, row)

    def _withdraw(self, job: Job) -> None:
        """Take a job out, finished or not; its rows are gone before the next step."""
        left = len(job.images)
        for row_id in list(job.images):
            row = job.loaded.engine.rows.get(row_id)
            if row is not None:
                job.loaded.batcher.tickets.pop(row.request, None)
            job.loaded.engine.cancel(row_id)
            self._owners.pop((job.loaded, row_id), None)
            job.leave(row_id)
        if left and not job.over:
            self.metrics.cancelled(left)
        job.over = True
        if job in self._jobs:
            del self._jobs[job]
            self._loop.call_soon_threadsafe(self.models.release, job.loaded)

    def _expire(self) -> None:
        now_s = time.monotonic()
        for job in list(self._jobs):
            if not job.over and job.deadline_s <= now_s:
                self.metrics.expired()
                self._tell(job, job.fail(_too_late()))
                self._withdraw(job)
            elif job.ask.progress and not job.started and now_s - job.told_s > TELL_EVERY_S:
                job.told_s = now_s
                self._tell(job, Waiting(self.position_of(job), self._until_started_s(job)))

    def _until_started_s(self, job: Job) -> float:
        """Its share of the engine begins when rows before it have left their places."""
        same = [other for other in self._jobs if other.left and other.shape == job.shape]
        rows = sum(len(other.left) for other in same)
        key = job.loaded.key(job.shape)
        step_s = self.forecast.step_s(key, self.forecast.bound(key))
        shapes = len({(other.loaded.weights, other.shape) for other in self._jobs if other.left})
        before = sum(len(o.left) for o in same if o.arrived_s < job.arrived_s)
        beyond = before + len(job.left) - self.config.max_rows
        if beyond <= 0 or not rows:
            return step_s * max(1, shapes)
        calls = sum(other.place_steps for other in same) / rows / 2
        return step_s * max(1, shapes) * calls * beyond / self.config.max_rows

    def _step(self, loaded: Loaded) -> None:
        engine, batcher = loaded.engine, loaded.batcher
        before, started_s = replace(engine.spent), time.monotonic()
        try:
            results = engine.step()
            self._pacer.keep_up()
        except OutOfMemory as error:
            self._shrink(loaded, error)
            return
        seconds = time.monotonic() - started_s
        self._turns.charge(loaded.weights, seconds)
        batcher.charge(seconds)
        rows = batcher.chosen
        if rows:
            key = loaded.key(rows[0].shape)
            places = sum(row.num_places for row in rows)
            steps_s = seconds if self._pacer.device else engine.spent.steps - before.steps
            self.forecast.saw_step(key, places, steps_s, self._pacer.step_bytes())
            if results and engine.spent.side > before.side:
                self.forecast.saw_decode(key, engine.spent.side - before.side)
            self.metrics.stepped(loaded.weights.uri, len(rows), seconds)
        for row in rows:
            self._tell_progress(loaded, row.id, seconds)
        for result in results:
            self._tell_result(loaded, result)

    def _shrink(self, loaded: Loaded, error: OutOfMemory) -> None:
        """Go on with smaller calls; a call of one row that does not fit never will."""
        rows = loaded.batcher.chosen
        self._pacer.clear()
        if len(rows) > 1:
            places = sum(row.num_places for row in rows)
            self.forecast.ran_out(loaded.key(rows[0].shape), places)
            return
        for row in rows:
            job = self._owners.get((loaded, row.id))
            if job is not None:
                message = "the picture does not fit the device's memory; ask for a smaller one"
                self._tell(job, job.fail(Failed("invalid", message, "size")))
                self._withdraw(job)

    def _tell_progress(self, loaded: Loaded, row_id: int, step_s: float) -> None:
        job = self._owners.get((loaded, row_id))
        if job is None or row_id not in loaded.engine.rows:
            return
        if not job.started:
            job.started = True
            self.metrics.started(time.monotonic() - job.arrived_s)
        done, total = loaded.engine.progress(row_id)
        job.left[row_id] = (total - done) * loaded.engine.rows[row_id].num_places
        image = job.images[row_id]
        if job.ask.progress:
            self._tell(job, Step(image, done, total, (total - done) * step_s))
        owed = job.owed.get(row_id, [])
        if owed and done >= owed[0]:
            index = job.ask.partial_images - len(owed)
            owed.pop(0)
            preview = loaded.engine.preview(row_id)
            if preview is not None:
                self._tell(job, Partial(image, index, to_pixels(preview)))

    def _tell_result(self, loaded: Loaded, result: Result) -> None:
        loaded.batcher.tickets.pop(result.request, None)
        job = self._owners.pop((loaded, result.id), None)
        if job is None or job.over:
            return
        if result.image is None:
            self._tell(job, job.fail(Failed("invalid", str(result.error))))
            self._withdraw(job)
        elif self._safety is not None and not self._safety.allows(result.image):
            refusal = "the safety checker holds the picture back; change the prompt"
            self._tell(job, job.fail(Failed("refused", refusal, "prompt")))
            self._withdraw(job)
        else:
            self.metrics.made(loaded.weights.uri)
            self._tell(job, job.finish(result.id, result.image, result.warnings))

    def _tell(self, job: Job, event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop is gone, and its callers with it
            self._loop.call_soon_threadsafe(job.events.put_nowait, event)


class _Pacer:
    """Keeps the host at most one step ahead of a GPU, and reads what a step needed of its memory.

    Without it the host would queue steps that nobody can leave or join any more.
    """

    def __init__(self) -> None:
        self.device = "cuda" if torch.cuda.is_available() else None
        self._last: torch.cuda.Event | None = None

    def keep_up(self) -> None:
        if self.device is None:
            return
        if self._last is not None:
            self._last.synchronize()
        self._last = torch.cuda.Event()
        self._last.record()

    def step_bytes(self) -> float:
        if self.device is None:
            return 0.0
        peak = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return float(peak)

    def clear(self) -> None:
        if self.device is not None:
            torch.cuda.empty_cache()


def _too_late() -> Failed:
    return Failed("deadline", "the deadline has passed before the pictures were made", "deadline_s")
