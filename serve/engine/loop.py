"""One replica on its event loop: from an API request to its events.

Owns what happens before the engine gets a request: names are looked up, a full queue refuses, and
models and adapters are loaded. The stepper does the steps, in a thread of its own. Knows nothing of
HTTP or of Ray.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from rayjobs.config import BadInput
from rayjobs.diffusion.adapters.placed import PlacedAdapter
from rayjobs.diffusion.modules.compiled import make_deterministic
from rayjobs.diffusion.request import Lora
from rayjobs.models.facts import ModelFacts
from rayjobs.storage import StorageError
from serve.config import EngineConfig
from serve.engine.forecast import Forecast
from serve.engine.models import LoadedModel, ModelCache, ModelMemoryFull
from serve.engine.nets import NetCache
from serve.engine.request_state import RequestState, estimate, slots_of
from serve.engine.safety import Safety
from serve.engine.stepper import BROKEN, Stepper
from serve.metrics import EngineMetrics
from serve.protocol import (
    TOO_LATE,
    ControlUse,
    Event,
    Failed,
    Finished,
    ImagesRequest,
    IpAdapterUse,
)
from serve.registry import Entry, Registry, Weights
from serve.tracing import Stages

LAG_EVERY_S = 0.1
WARM_STEPS = 3


class EngineLoop:
    """Answers requests with events. Created and used on one event loop."""

    def __init__(
        self,
        config: EngineConfig,
        registry: Registry,
        metrics: EngineMetrics | None = None,
        safety: Safety | None = None,
    ):
        self.config = config
        self.registry = registry
        if config.deterministic:
            make_deterministic()
        self.metrics = metrics or EngineMetrics()
        forecast = Forecast(2 * config.max_rows, config.max_step_s)
        self.models = ModelCache(config, forecast, self.metrics.model_loaded)
        self.stepper = Stepper(self.models, forecast, self.metrics, safety)
        self._preparing: dict[ImagesRequest, float] = {}
        """Seconds of work of requests whose model or adapters are being loaded."""
        self._lag = asyncio.get_running_loop().create_task(self._watch_lag())

    @property
    def failure(self) -> BaseException | None:
        """Why this process must be replaced."""
        return self.stepper.failure

    async def generate(self, request: ImagesRequest) -> AsyncIterator[Event]:
        """A request's events, to its last image or its failure; closing early ends its rows.

        Its deadline is kept here, so that it holds during a long step too.
        """
        arrived_s, state, outcome = time.monotonic(), None, "cancelled"
        stages = Stages("prepare")
        until_s = _until(request.deadline_s)
        try:
            async with asyncio.timeout_at(until_s):
                state = await self._prepare(request, arrived_s, stages)
            if isinstance(state, Failed):
                outcome = state.kind
                yield state
                return
            left = len(request.seeds)
            while left:
                async with asyncio.timeout_at(until_s):
                    event = await state.events.get()
                left -= isinstance(event, Finished)
                if isinstance(event, Failed):
                    left, outcome = 0, event.kind
                elif not left:
                    outcome = "ok"
                yield event
        except TimeoutError:
            outcome = "deadline"
            self.metrics.expired()
            yield TOO_LATE
        finally:
            if isinstance(state, RequestState):
                self.stepper.withdraw(state)
            stages.end(outcome)
            self.metrics.request_finished(request, outcome, time.monotonic() - arrived_s)

    def pending_s(self) -> float:
        """Seconds until all current requests are done."""
        return self.stepper.backlog.pending_s() + sum(self._preparing.values())

    def load(self) -> dict[str, tuple[int, int]]:
        """Images in progress and waiting, by model."""
        load: dict[str, tuple[int, int]] = {}
        active = list(self.stepper.backlog.states)
        rows = [(s.request, len(s.images), 0) for s in active if s.started]
        rows += [(s.request, 0, len(s.request.seeds)) for s in active if not s.started]
        rows += [(request, 0, len(request.seeds)) for request in list(self._preparing)]
        for request, started, waiting in rows:
            before = load.get(request.model, (0, 0))
            load[request.model] = (before[0] + started, before[1] + waiting)
        return load

    def names(self) -> list[str]:
        """Names of models and adapters that are in memory."""
        loaded_models = dict(self.models.loaded)
        beside = {uri for loaded in loaded_models.values() for uri in list(loaded.uris)}
        nets: set[tuple[str, ...]] = set()
        for loaded in loaded_models.values():
            nets |= loaded.controls.uris() | loaded.ip_adapters.uris()

        def is_here(entry: Entry) -> bool:
            if entry.net is not None:
                return entry.net in nets
            return entry.weights in loaded_models if entry.lora is None else entry.lora in beside

        return [entry.name for entry in self.registry.entries() if is_here(entry)]

    def facts(self) -> dict[str, ModelFacts]:
        """Of the models in memory, by their names."""
        loaded_models = dict(self.models.loaded)
        facts = {}
        for entry in self.registry.entries():
            loaded = None if entry.weights is None else loaded_models.get(entry.weights)
            if loaded is not None:
                model = loaded.engine.model
                multiple = max(8, model.vae_scale)
                facts[entry.name] = ModelFacts(
                    model.family, model.default_side, multiple, model.prediction, model.usual
                )
        return facts

    async def warm_up(self, name: str) -> None:
        """Load a model, make one image and then a full batch.

        The first callers find it warm, and waiting times can be estimated.
        """
        for number in (1, self.config.max_rows):
            failed = await self._make_one(name, number)
            if failed is not None:
                raise BadInput(f"model {name}: {failed.message}")
        self._warn_if_slow(name)

    async def _make_one(self, name: str, number: int = 1) -> Failed | None:
        """Images of a model's own size, to learn how long its steps take."""
        seeds = tuple(range(number))
        request = ImagesRequest(
            id="warm-up", caller="", model=name, prompt="", seeds=seeds, steps=WARM_STEPS
        )
        events = [event async for event in self.generate(request)]
        return next((event for event in events if isinstance(event, Failed)), None)

    def _warn_if_slow(self, name: str) -> None:
        """A model's own size is always made: then the promise of `max_step_s` is not kept."""
        entry = self.registry.get(name)
        loaded = self.models.loaded.get(entry.weights) if entry and entry.weights else None
        if loaded is None:
            return
        step_s = self.stepper.forecast.known_step_s(loaded.key(loaded.own_shape), 2)
        if step_s is not None and step_s > self.config.max_step_s:
            logging.getLogger("rayjobs").warning(
                "model %s: a step of its own size takes %.2g s, longer than engine.max_step_s, "
                "%g s; newcomers wait as long",
                name,
                step_s,
                self.config.max_step_s,
            )

    async def close(self) -> None:
        self._lag.cancel()
        await self.stepper.close()

    async def _prepare(
        self, request: ImagesRequest, arrived_s: float, stages: Stages
    ) -> RequestState | Failed:
        """A request's state with its model acquired and its adapters read, or a failure."""
        entry = await self._find(request.model)
        if entry is None or entry.weights is None:
            return Failed("invalid", f"the model {request.model!r} does not exist", "model")
        if self.failure is not None:
            return BROKEN
        refused = self._refuse(request, entry.weights)
        if refused is not None:
            return refused
        self._preparing[request] = self.stepper.backlog.work_s(request, entry.weights)
        loaded = None
        try:
            loaded = await self.models.acquire(entry.weights)
            too_long = await self._too_long(request, loaded)
            if too_long is not None:
                return too_long
            state, adapters = await self._new_state(request, entry, loaded)
            state.arrived_s, state.stages = arrived_s, stages
            stages.enter("wait")
            self.stepper.submit(state, adapters)
            loaded = None  # released with the state
            return state
        except BadInput as error:
            return Failed("invalid", str(error), "model")
        except (ModelMemoryFull, StorageError) as error:
            full = isinstance(error, ModelMemoryFull)
            reason = str(error) if full else "the model's storage is not available"
            return Failed("busy", reason, None, max(5.0, self.pending_s()))
        finally:
            self._preparing.pop(request, None)
            if loaded is not None:
                self.models.release(loaded)

    async def _new_state(
        self, request: ImagesRequest, entry: Entry, loaded: LoadedModel
    ) -> tuple[RequestState, list[PlacedAdapter]]:
        """The state of a request, and the adapters that the engine does not have yet."""
        uses: list[tuple[Entry | None, float]] = [] if entry.lora is None else [(entry, 1.0)]
        for name, scale in request.loras:
            uses.append((await self._find(name), scale))
        adapters = []
        for use, scale in uses:
            if use is None or use.lora is None:
                raise BadInput("a LoRA of this request no longer exists")
            adapters.append((await self.models.read_adapter(loaded, use.lora, use.version), scale))
        new = [adapter for adapter, _ in adapters if isinstance(adapter, PlacedAdapter)]
        loras = tuple(
            Lora(path=one.path if isinstance(one, PlacedAdapter) else one, scale=scale)
            for one, scale in adapters
        )
        controls = await self._nets(loaded.controls, request.controls)
        ip_adapters = await self._nets(loaded.ip_adapters, request.ip_adapters)
        queue: asyncio.Queue[Event] = asyncio.Queue()
        return RequestState(request, loaded, queue, loras, controls, ip_adapters), new

    async def _nets(
        self, cache: NetCache, uses: Sequence[ControlUse | IpAdapterUse]
    ) -> tuple[Any, ...]:
        """The ControlNets or IP-Adapters of a request."""
        found = []
        for use in uses:
            entry = await self._find(use.name)
            if entry is None or entry.net is None or entry.kind != cache.kind.entry:
                raise BadInput(f"{cache.kind.one} of this request no longer exists")
            found.append(await self.models.read_net(cache, entry.net))
        return tuple(found)

    async def _too_long(self, request: ImagesRequest, loaded: LoadedModel) -> Failed | None:
        """Whether steps of this size would let others wait too long, measured if need be."""
        model = loaded.engine.model
        shape, _ = estimate(request, model.default_side, model.vae_scale)
        slots, own = slots_of(request), loaded.own_shape
        is_large = shape[-1] * shape[-2] > own[-1] * own[-2]
        if is_large and self.stepper.forecast.known_step_s(loaded.key(own), slots) is None:
            await self._make_one(request.model)
        return self.stepper.backlog.too_long(loaded, shape, slots)

    async def _find(self, name: str) -> Entry | None:
        """An entry; only a name that is not known yet, but to the ingress, waits for storage."""
        return self.registry.get(name) or await asyncio.to_thread(self.registry.find, name, True)

    def _refuse(self, request: ImagesRequest, weights: Weights) -> Failed | None:
        """Refuse when too much work waits; retry after it is done."""
        pending_s = self.pending_s()
        work_s = self.stepper.backlog.work_s(request, weights)
        if not pending_s or pending_s + work_s <= self.config.max_pending_s:
            return None
        return Failed("busy", "too many requests are waiting", None, pending_s)

    async def _watch_lag(self) -> None:
        """Measure how late the event loop runs: it delays every event sent to callers."""
        while True:
            before_s = time.monotonic()
            await asyncio.sleep(LAG_EVERY_S)
            self.metrics.lag(time.monotonic() - before_s - LAG_EVERY_S)


def _until(deadline_s: float | None) -> float | None:
    """When so many seconds are over, by the event loop's clock."""
    return None if deadline_s is None else asyncio.get_running_loop().time() + deadline_s
