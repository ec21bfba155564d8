"""The models of one replica: loaded when asked for, let go when memory is wanted.

Owns what is in memory and who may be evicted. Knows nothing of requests' order or of HTTP.
"""

import asyncio
import contextlib
import copy
import gc
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from rayjobs import storage
from rayjobs.config import BadInput
from rayjobs.diffusion.engine import Engine
from rayjobs.diffusion.lora import Adapter, weight_file
from rayjobs.diffusion.model import Model, ModelOptions, load_model
from rayjobs.diffusion.text.inversion import load_word
from rayjobs.diffusion.weights import first_line, locate
from serve.config import EngineConfig
from serve.engine.fairness import FairBatcher
from serve.engine.forecast import Forecast
from serve.registry import Weights


class NoRoom(RuntimeError):
    """Every model in memory is in use, and there is no room for one more."""


@dataclass(eq=False)
class Loaded:
    """A model in memory with its engine; `users` are the asks that need it to stay."""

    weights: Weights
    engine: Engine
    batcher: FairBatcher[Any]
    num_bytes: int
    users: int = 0
    used_s: float = field(default_factory=time.monotonic)
    shape: tuple[int, ...] = ()
    """Of the latents of its last step."""
    side_s: float = 0.0
    """Spent on prompts and pictures since the last of these was finished."""
    adapters: dict[str, tuple[str, float]] = field(default_factory=dict)
    """SHA-256 and time of last use of each adapter, by its path."""
    uris: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Paths and versions of the adapters, by where they came from."""
    base: "Loaded | None" = None
    """The model whose parts it shares, and which it keeps in memory."""

    @property
    def held_bytes(self) -> int:
        """Of its own weights and of the adapters beside them."""
        return self.num_bytes + self.engine.loras.num_bytes

    def key(self, shape: tuple[int, ...]) -> tuple[Weights, tuple[int, ...]]:
        return self.weights, shape


class Models:
    """At most `config.model_memory_gb` of weights; the ones not used for longest leave first."""

    def __init__(
        self,
        config: EngineConfig,
        forecast: Forecast,
        on_load: Callable[[Weights, float], None] = lambda weights, seconds: None,
    ):
        self.config = config
        self.forecast = forecast
        self.loaded: dict[Weights, Loaded] = {}
        self.leaving: deque[Loaded] = deque()
        """Evicted ones whose adapters the engine's thread is to take off parts that others use."""
        self._on_load = on_load
        self._loading: dict[Weights, asyncio.Future[Loaded]] = {}
        self._reader = ThreadPoolExecutor(2, thread_name_prefix="adapters")
        # One at a time: while diffusers loads, all new parameters of the process have no data.
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="loading")
        self._most_bytes = _memory(config)

    async def hold(self, weights: Weights) -> Loaded:
        """The model, loaded if need be, kept until `release`. Other models go on meanwhile.

        Raises BadInput when it cannot be loaded, NoRoom when all that is in memory is in use.
        """
        while weights not in self.loaded:
            if weights not in self._loading:
                task = asyncio.ensure_future(self._load(weights))
                self._loading[weights] = task
                task.add_done_callback(lambda _: self._loading.pop(weights, None))
            # A caller who leaves does not end the loading: others may wait for it, or soon will.
            await asyncio.shield(self._loading[weights])
        found = self.loaded[weights]
        found.users += 1
        return found

    def release(self, loaded: Loaded) -> None:
        loaded.users -= 1
        loaded.used_s = time.monotonic()

    async def read_adapter(self, loaded: Loaded, uri: str, version: str) -> Adapter | str:
        """An adapter to be admitted between two steps, or the path of one that is there already.

        Raises BadInput for one that is none, Unavailable while its storage is away.
        """
        path, known = loaded.uris.get(uri, ("", ""))
        if path in loaded.adapters and known == version:
            return path

        def read() -> Adapter:
            return loaded.engine.loras.read(str(weight_file(Path(storage.to_local(uri)))))

        try:
            found = await asyncio.get_running_loop().run_in_executor(self._reader, read)
        except storage.Unavailable:
            raise
        except Exception as error:  # a damaged file may raise anything
            raise BadInput(f"the adapter cannot be loaded: {first_line(error)}") from None
        loaded.uris = {**loaded.uris, uri: (found.path, version)}
        return found

    def admit(self, loaded: Loaded, adapter: Adapter, in_use: set[str]) -> None:
        """Make an adapter usable; the one not used for longest leaves where there are too many.

        Called by the engine's own thread, between two steps.
        """
        if loaded.adapters.get(adapter.path, ("", 0.0))[0] == adapter.sha256:
            return
        idle = [path for path in loaded.adapters if path not in in_use]
        if len(loaded.adapters) >= self.config.max_loras and idle:
            oldest = min(idle, key=lambda path: loaded.adapters[path][1])
            sha256, _ = loaded.adapters.pop(oldest)
            loaded.uris = {uri: it for uri, it in loaded.uris.items() if it[0] != oldest}
            if all(sha256 != other for other, _ in loaded.adapters.values()):
                loaded.engine.loras.forget(sha256)
        sha256 = loaded.engine.loras.admit(adapter)
        loaded.adapters[adapter.path] = (sha256, time.monotonic())

    async def _load(self, weights: Weights) -> Loaded:
        started_s = time.monotonic()
        loop = asyncio.get_running_loop()
        base = self.loaded.get(replace(weights, words=(), version="")) if weights.words else None
        if base is not None:
            base.users += 1
        try:
            if base is None:
                self._make_room(await loop.run_in_executor(self._loader, _size_of, weights.uri))
            model = await loop.run_in_executor(self._loader, self._read, weights, base)
        except BaseException as error:
            if base is not None:
                base.users -= 1
            raise _told(error) from None
        num_bytes = _num_bytes(model, base is not None)
        with contextlib.suppress(NoRoom):  # it is here now; files may be of a smaller dtype
            self._make_room(num_bytes)
        self.loaded[weights] = loaded = self._with_engine(weights, model, num_bytes)
        loaded.base = base
        self._on_load(weights, time.monotonic() - started_s)
        return loaded

    def _read(self, weights: Weights, base: Loaded | None) -> Model:
        if base is None:
            options = ModelOptions(**weights.how.model_dump())
            parts = None if weights.config is None else storage.to_local(weights.config)
            path = storage.to_local(weights.uri)
            model = load_model(path, options, config=parts, alone=False)
        else:
            # Words change the text encoders only: the rest is shared with the model as it was.
            model = replace(
                base.engine.model,
                text_encoders=copy.deepcopy(base.engine.model.text_encoders),
                tokenizers=copy.deepcopy(base.engine.model.tokenizers),
                words={},
            )
        for uri, word in weights.words:
            load_word(model, storage.to_local(uri), word)
        return model

    def _with_engine(self, weights: Weights, model: Model, num_bytes: int) -> Loaded:
        batcher: FairBatcher[Any] = FairBatcher(
            self.config.max_rows, lambda shape: self.forecast.bound((weights, shape))
        )
        engine = Engine(
            model,
            self.config.max_rows,
            slots=self.forecast.most_places,
            fixed_shape=False,
            batcher=batcher,
            isolate_oom=True,
        )
        return Loaded(weights, engine, batcher, num_bytes)

    def _make_room(self, num_bytes: int) -> None:
        """Let idle models go until so much fits; a first model is always tried."""
        while self.loaded:
            held = sum(loaded.held_bytes for loaded in self.loaded.values())
            if held + num_bytes <= self._most_bytes:
                return
            idle = [loaded for loaded in self.loaded.values() if not loaded.users]
            if not idle:
                raise NoRoom("all models in memory are in use; come again")
            self._evict(min(idle, key=lambda loaded: loaded.used_s))

    def _evict(self, loaded: Loaded) -> None:
        del self.loaded[loaded.weights]
        if loaded.base is not None:
            self.leaving.append(loaded)
            self.release(loaded.base)
        if torch.cuda.is_available():
            gc.collect()  # a model is full of cycles
            torch.cuda.empty_cache()


def _memory(config: EngineConfig) -> float:
    if config.model_memory_gb is not None:
        return config.model_memory_gb * 2**30
    if torch.cuda.is_available():
        return 0.7 * torch.cuda.get_device_properties(0).total_memory
    return 0.5 * psutil.virtual_memory().total


def _size_of(uri: str) -> int:
    """About as many bytes as a model will take, by its files; fetches it first."""
    path = locate(storage.to_local(uri)).path
    files = [path] if path.is_file() else path.glob("*/*.safetensors")
    return sum(file.stat().st_size for file in files)


def _told(error: BaseException) -> BaseException:
    """Why a model could not be loaded: for good, or for now."""
    if isinstance(error, torch.OutOfMemoryError):
        return NoRoom("the model does not fit the memory beside the others; come again")
    if isinstance(error, storage.Unavailable | NoRoom) or not isinstance(error, Exception):
        return error
    return BadInput(f"the model cannot be loaded: {first_line(error)}")


def _num_bytes(model: Model, shares_parts: bool) -> int:
    """Of its weights; where the large parts are another model's, of the text encoders."""
    parts = model.text_encoders if shares_parts else [model.unet, model.vae, *model.text_encoders]
    return sum(p.nbytes for part in parts for p in part.parameters())
