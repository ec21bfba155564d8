"""A replica's answers: from an ask to its events, on the event loop.

Owns what happens before the engine has an ask: names, refusals, models and adapters that must be
loaded. The steps are the stepper's, in a thread of its own. Knows nothing of HTTP or of Ray.
"""

import asyncio
import time
from collections.abc import AsyncIterator

from rayjobs.config import BadInput
from rayjobs.diffusion.lora import Adapter
from rayjobs.diffusion.request import Lora
from rayjobs.models.facts import ModelFacts
from rayjobs.storage import StorageError
from serve.config import EngineConfig
from serve.engine.forecast import Forecast
from serve.engine.job import Job
from serve.engine.models import Loaded, Models, NoRoom
from serve.engine.safety import Safety
from serve.engine.stepper import BROKEN, Stepper, too_late
from serve.metrics import EngineMetrics
from serve.protocol import Ask, Event, Failed, Finished
from serve.registry import Entry, Registry, Weights

LAG_EVERY_S = 0.1
WARM_STEPS = 3


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
        forecast = Forecast(2 * config.max_rows, config.max_step_s)
        self.models = Models(config, forecast, self.metrics.saw_load)
        self.stepper = Stepper(self.models, forecast, self.metrics, safety)
        self._coming: dict[Ask, float] = {}
        """Seconds of work of asks whose model or adapters are being loaded."""
        self._lag = asyncio.get_running_loop().create_task(self._watch_lag())

    @property
    def failure(self) -> BaseException | None:
        """Why this process must be replaced."""
        return self.stepper.failure

    async def generate(self, ask: Ask) -> AsyncIterator[Event]:
        """What becomes of an ask, to its last image or its failure; leaving early ends its rows."""
        arrived_s, job, outcome = time.monotonic(), None, "cancelled"
        try:
            async with asyncio.timeout(ask.deadline_s):
                job = await self._prepare(ask, arrived_s)
            if isinstance(job, Failed):
                outcome = job.kind
                yield job
                return
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
            yield too_late()
        finally:
            if isinstance(job, Job):
                self.stepper.withdraw(job)
            self.metrics.answered(ask, outcome, time.monotonic() - arrived_s)

    def pending_s(self) -> float:
        """Seconds until all that is here now is done."""
        return self.stepper.pending_s() + sum(self._coming.values())

    def names(self) -> list[str]:
        """Names of models and adapters that are in memory."""
        held = dict(self.models.loaded)
        adapters = {uri for loaded in held.values() for uri in list(loaded.uris)}
        return [
            entry.name
            for entry in self.registry.entries()
            if (entry.weights in held if entry.lora is None else entry.lora in adapters)
        ]

    def facts(self) -> dict[str, ModelFacts]:
        """Of the models in memory, by their names."""
        held = dict(self.models.loaded)
        found = {}
        for entry in self.registry.entries():
            loaded = None if entry.weights is None else held.get(entry.weights)
            if loaded is not None:
                model = loaded.engine.model
                multiple = max(8, model.vae_scale)
                found[entry.name] = ModelFacts(
                    model.family, model.default_side, multiple, model.is_edm
                )
        return found

    async def warm_up(self, name: str) -> None:
        """Load a model and make a picture with it, then a full call's: the first callers find it
        warm, and what waiting times are told from has been seen."""
        for number in (1, self.config.max_rows):
            seeds = tuple(range(number))
            ask = Ask(id="warm-up", caller="", model=name, prompt="", seeds=seeds, steps=WARM_STEPS)
            async for event in self.generate(ask):
                if isinstance(event, Failed):
                    raise BadInput(f"model {name}: {event.message}")

    async def close(self) -> None:
        self._lag.cancel()
        await self.stepper.close()

    async def _prepare(self, ask: Ask, arrived_s: float) -> Job | Failed:
        """A job with its model held and its adapters read, or why there is none."""
        entry = await asyncio.to_thread(self.registry.find, ask.model)
        if entry is None or entry.weights is None:
            return Failed("invalid", f"the model {ask.model!r} does not exist", "model")
        if self.failure is not None:
            return BROKEN
        refused = self._refuse(ask, entry.weights)
        if refused is not None:
            return refused
        self._coming[ask] = self.stepper.work_s(ask, entry.weights)
        loaded = None
        try:
            loaded = await self.models.hold(entry.weights)
            job, adapters = await self._job(ask, entry, loaded)
            job.arrived_s = arrived_s
            self.stepper.submit(job, adapters)
            loaded = None  # the job's to release
            return job
        except BadInput as error:
            return Failed("invalid", str(error), "model")
        except (NoRoom, StorageError) as error:
            told = str(error) if isinstance(error, NoRoom) else "the model's storage is away"
            return Failed("busy", told, None, max(5.0, self.pending_s()))
        finally:
            self._coming.pop(ask, None)
            if loaded is not None:
                self.models.release(loaded)

    async def _job(self, ask: Ask, entry: Entry, loaded: Loaded) -> tuple[Job, list[Adapter]]:
        """The job of an ask, and the adapters that it needs and the engine has not."""
        uses: list[tuple[Entry | None, float]] = [] if entry.lora is None else [(entry, 1.0)]
        for name, scale in ask.loras:
            uses.append((await asyncio.to_thread(self.registry.find, name), scale))
        found = []
        for use, scale in uses:
            if use is None or use.lora is None:
                raise BadInput("a LoRA of this request does not exist any more")
            found.append((await self.models.read_adapter(loaded, use.lora, use.version), scale))
        new = [adapter for adapter, _ in found if isinstance(adapter, Adapter)]
        loras = tuple(
            Lora(path=one.path if isinstance(one, Adapter) else one, scale=scale)
            for one, scale in found
        )
        return Job(ask, loaded, asyncio.Queue(), loras), new

    def _refuse(self, ask: Ask, weights: Weights) -> Failed | None:
        """A full replica's answer: come again when what waits now is done."""
        pending_s = self.pending_s()
        work_s = self.stepper.work_s(ask, weights)
        if not pending_s or pending_s + work_s <= self.config.max_pending_s:
            return None
        return Failed("busy", "too many requests are waiting", None, pending_s)

    async def _watch_lag(self) -> None:
        """How late the event loop is: what a caller's bytes wait for besides the network."""
        while True:
            before_s = time.monotonic()
            await asyncio.sleep(LAG_EVERY_S)
            self.metrics.lag(time.monotonic() - before_s - LAG_EVERY_S)
