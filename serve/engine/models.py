"""The models of one replica: loaded on request, evicted when memory is needed.

Owns which models and adapters are in memory, and which may be evicted. A model in use is never
evicted, so this is not a plain LRU cache. Knows nothing of scheduling or of HTTP.
"""

import asyncio
import contextlib
import copy
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from rayjobs import storage
from rayjobs.config import BadInput
from rayjobs.diffusion.adapters.placed import PlacedAdapter
from rayjobs.diffusion.adapters.reader import Adapter
from rayjobs.diffusion.engine import Engine
from rayjobs.diffusion.faults import OutOfMemory
from rayjobs.diffusion.files.beside import lora_file
from rayjobs.diffusion.files.header import first_line
from rayjobs.diffusion.model import Model
from rayjobs.models.exports import words_file
from rayjobs.models.facts import find_weights
from rayjobs.models.loading import load_weights, teach
from rayjobs.models.options import SourceConfig
from rayjobs.models.warming import warm
from serve.config import EngineConfig
from serve.engine import memory
from serve.engine.fairness import FairBatcher
from serve.engine.forecast import Forecast
from serve.engine.nets import CONTROLS, IP_ADAPTERS, NetCache
from serve.registry import Weights

LATENT_CHANNELS = 4
ADAPTER_SHARE = 0.25
"""Of the memory for models, which the LoRAs of each may take, and as much its ControlNets and its
IP-Adapters."""


class ModelMemoryFull(RuntimeError):
    """All that is in memory is in use, and there is no room for one more model or adapter."""


@dataclass
class KeptAdapter:
    """An adapter in memory."""

    sha256: str
    num_bytes: int
    used_s: float = field(default_factory=time.monotonic)


@dataclass(eq=False)
class LoadedModel:
    """A model in memory with its engine; it stays while it has `users`, requests in progress."""

    weights: Weights
    engine: Engine
    batcher: FairBatcher[Any]
    num_bytes: int
    users: int = 0
    used_s: float = field(default_factory=time.monotonic)
    shape: tuple[int, ...] = ()
    """Of the latents of its last step."""
    vae_s: float = 0.0
    """Time for prompts and images since the last image was finished."""
    adapters: dict[str, KeptAdapter] = field(default_factory=dict)
    """By path."""
    replaced: list[KeptAdapter] = field(default_factory=list)
    """Without a path any more, which is another file's now; rows may still use them."""
    uris: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Path and version of each adapter, by its uri."""
    base: "LoadedModel | None" = None
    """The model whose parts it shares; it stays in memory as long as this one."""
    max_control_bytes: float = float("inf")
    max_ip_adapter_bytes: float = float("inf")

    @cached_property
    def controls(self) -> NetCache:
        return NetCache(self.engine, CONTROLS, self.max_control_bytes)

    @cached_property
    def ip_adapters(self) -> NetCache:
        return NetCache(self.engine, IP_ADAPTERS, self.max_ip_adapter_bytes)

    @property
    def held_bytes(self) -> int:
        """Bytes of its own weights, and of what is loaded beside them."""
        banks = self.engine.loras, self.engine.controls, self.engine.ip_adapters
        return self.num_bytes + sum(bank.num_bytes for bank in banks)

    @property
    def own_shape(self) -> tuple[int, ...]:
        """Of the latents of its own size."""
        side = self.engine.model.default_side // self.engine.model.vae_scale
        return (LATENT_CHANNELS, side, side)

    @property
    def adapter_bytes(self) -> int:
        kept = [*self.adapters.values(), *self.replaced]
        return sum({each.sha256: each.num_bytes for each in kept}.values())

    def key(self, shape: tuple[int, ...]) -> tuple[Weights, tuple[int, ...]]:
        return self.weights, shape


class ModelCache:
    """At most `config.model_memory_gb` of weights; the least recently used are evicted first."""

    def __init__(
        self,
        config: EngineConfig,
        forecast: Forecast,
        on_load: Callable[[Weights, float], None] = lambda weights, seconds: None,
    ):
        self.config = config
        self.forecast = forecast
        self.loaded: dict[Weights, LoadedModel] = {}
        self.leaving: deque[LoadedModel] = deque()
        """Evicted models; the engine's thread detaches their adapters from shared parts."""
        self._on_load = on_load
        self._loading: dict[Weights, asyncio.Future[LoadedModel]] = {}
        self._reader = ThreadPoolExecutor(2, thread_name_prefix="adapters")
        # A storage that is slow for one model does not delay others that are here already.
        self._fetcher = ThreadPoolExecutor(4, thread_name_prefix="fetching")
        # One at a time: while diffusers loads, new parameters anywhere in the process have no data.
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="loading")
        self._max_bytes = memory.for_models(config)
        self._max_adapter_bytes = _share(config.lora_memory_gb, self._max_bytes)
        self._max_control_bytes = _share(config.control_memory_gb, self._max_bytes)
        self._max_ip_adapter_bytes = _share(config.ip_adapter_memory_gb, self._max_bytes)

    async def acquire(self, weights: Weights) -> LoadedModel:
        """The model, loaded if necessary and kept until `release`. Other models continue meanwhile.

        Raises BadInput when it cannot be loaded, ModelMemoryFull when no other can be evicted.
        """
        while weights not in self.loaded:
            if weights not in self._loading:
                task = asyncio.ensure_future(self._load(weights))
                self._loading[weights] = task
                task.add_done_callback(lambda _: self._loading.pop(weights, None))
            # A caller that disconnects does not cancel the load: others may need it.
            await asyncio.shield(self._loading[weights])
        loaded = self.loaded[weights]
        loaded.users += 1
        return loaded

    def release(self, loaded: LoadedModel) -> None:
        loaded.users -= 1
        loaded.used_s = time.monotonic()

    async def read_adapter(
        self, loaded: LoadedModel, uri: str, version: str
    ) -> PlacedAdapter | str:
        """An adapter to admit between two steps, or the path of one that is already loaded.

        Raises BadInput for a file that is no adapter, or one too large; Unavailable while its
        storage is away.
        """
        path, known = loaded.uris.get(uri, ("", ""))
        if path in loaded.adapters and known == version:
            return path
        loras, run = loaded.engine.loras, asyncio.get_running_loop().run_in_executor

        def read() -> Adapter:
            return loras.read(str(lora_file(Path(storage.to_local(uri)))))

        try:
            adapter = await run(self._reader, read)
            num_bytes = adapter.num_bytes(loaded.engine.model.dtype)
            self._check_size(num_bytes)
            # Else its own model's adapters make room, or it takes of what steps may use.
            with contextlib.suppress(ModelMemoryFull):
                self._make_room(num_bytes)
            placed = await run(self._reader, loras.place, adapter)
        except storage.Unavailable:
            raise
        except torch.OutOfMemoryError:
            raise ModelMemoryFull("the adapter does not fit in memory; try again later") from None
        except Exception as error:  # a damaged file may raise anything
            raise BadInput(f"the adapter cannot be loaded: {first_line(error)}") from None
        loaded.uris = {**loaded.uris, uri: (placed.path, version)}
        return placed

    async def read_net(self, cache: NetCache, uris: tuple[str, ...]) -> Any:
        """A ControlNet or an IP-Adapter to admit between two steps.

        Raises BadInput for what is none, or is for other models, or too large; Unavailable while
        its storage is away.
        """
        known, run = cache.find(uris), asyncio.get_running_loop().run_in_executor
        if known is not None:
            return known
        try:
            paths, num_bytes = await run(self._fetcher, cache.fetch, uris)
            with contextlib.suppress(ModelMemoryFull):
                self._make_room(num_bytes)
            return await run(self._loader, cache.read, uris, paths)
        except storage.Unavailable:
            raise
        except torch.OutOfMemoryError:
            reason = f"the {cache.kind.name} does not fit in memory; try again later"
            raise ModelMemoryFull(reason) from None
        except Exception as error:  # a damaged file may raise anything
            reason = f"the {cache.kind.name} cannot be loaded: {first_line(error)}"
            raise BadInput(reason) from None

    def admit(self, loaded: LoadedModel, placed: PlacedAdapter, in_use: set[str]) -> None:
        """Keep an adapter; the least recently used ones that are not in use leave for it.

        `in_use` are paths. Called by the engine's thread, between two steps. Raises ModelMemoryFull
        while those in use leave no memory for it.
        """
        known = loaded.adapters.get(placed.path)
        if known is not None and known.sha256 == placed.sha256:
            return
        if known is not None:
            loaded.replaced.append(loaded.adapters.pop(placed.path))
        self._forget_replaced(loaded)
        while self._is_too_much(loaded, placed):
            idle = [path for path in loaded.adapters if path not in in_use]
            if not idle:
                break
            self._forget(loaded, min(idle, key=lambda path: loaded.adapters[path].used_s))
        if loaded.adapter_bytes + placed.num_bytes > self._max_adapter_bytes:
            raise ModelMemoryFull(
                "the LoRAs of requests in progress fill engine.lora_memory_gb; try again later"
            )
        sha256 = loaded.engine.loras.admit(placed)
        loaded.adapters[placed.path] = KeptAdapter(sha256, placed.num_bytes)

    def _check_size(self, num_bytes: int) -> None:
        """Raise ValueError for an adapter that there is never room for."""
        if num_bytes > self._max_adapter_bytes:
            raise ValueError(
                f"it takes {num_bytes / 2**30:.3g} GiB, more than engine.lora_memory_gb, "
                f"{self._max_adapter_bytes / 2**30:.3g}; raise that, or give one of a lower rank"
            )

    def _is_too_much(self, loaded: LoadedModel, placed: PlacedAdapter) -> bool:
        is_many = len(loaded.adapters) >= self.config.max_loras
        return is_many or loaded.adapter_bytes + placed.num_bytes > self._max_adapter_bytes

    def _forget(self, loaded: LoadedModel, path: str) -> None:
        loaded.replaced.append(loaded.adapters.pop(path))
        loaded.uris = {uri: it for uri, it in loaded.uris.items() if it[0] != path}
        self._forget_replaced(loaded)

    def _forget_replaced(self, loaded: LoadedModel) -> None:
        """Give back the memory of adapters without a path, as soon as no row uses them."""
        rows = loaded.engine.rows.values()
        in_use = {sha256 for row in rows for sha256, _ in row.loras}
        in_use |= {kept.sha256 for kept in loaded.adapters.values()}
        for sha256 in {kept.sha256 for kept in loaded.replaced} - in_use:
            loaded.replaced = [kept for kept in loaded.replaced if kept.sha256 != sha256]
            loaded.engine.loras.forget(sha256)

    async def _load(self, weights: Weights) -> LoadedModel:
        started_s = time.monotonic()
        loop = asyncio.get_running_loop()
        plain = replace(weights, words=(), version="")
        base = self.loaded.get(plain) if weights.words else None
        if base is not None:
            base.users += 1
        try:
            here = await loop.run_in_executor(self._fetcher, _fetch, weights)
            if base is None:
                self._make_room(await loop.run_in_executor(self._fetcher, _size_of, here.source))
            model = await loop.run_in_executor(self._loader, self._read, here, base)
            num_bytes = _num_bytes(model, base is not None)
            # Its files may have a smaller dtype than its weights; it is loaded now, so it stays.
            with contextlib.suppress(ModelMemoryFull):
                self._make_room(num_bytes)
            loaded = self._with_engine(weights, model, num_bytes)
            # Nothing is compiled later, while others wait for steps.
            cache_uri = weights.how.compile_cache
            await loop.run_in_executor(self._loader, warm, loaded.engine, cache_uri)
        except BaseException as error:
            if base is not None:
                base.users -= 1
            raise translate_error(error) from None
        self.loaded[weights] = loaded
        loaded.base = base
        self._on_load(weights, time.monotonic() - started_s)
        return loaded

    def _read(self, weights: Weights, base: LoadedModel | None) -> Model:
        if base is None:
            model = load_weights(weights.source, weights.how, alone=False)
        else:
            # Learned embeddings change only the text encoders: the rest is shared with the base.
            model = replace(
                base.engine.model,
                text_encoders=copy.deepcopy(base.engine.model.text_encoders),
                tokenizers=copy.deepcopy(base.engine.model.tokenizers),
            )
        return teach(model, weights.words)

    def _with_engine(self, weights: Weights, model: Model, num_bytes: int) -> LoadedModel:
        batcher: FairBatcher[Any] = FairBatcher(
            self.config.max_rows, lambda shape: self.forecast.bound((weights, shape))
        )
        engine = Engine(
            model,
            self.config.max_rows,
            slots=self.forecast.max_slots,
            fixed_shape=self.config.deterministic,
            batcher=batcher,
            isolate_oom=True,
        )
        return LoadedModel(
            weights,
            engine,
            batcher,
            num_bytes,
            max_control_bytes=self._max_control_bytes,
            max_ip_adapter_bytes=self._max_ip_adapter_bytes,
        )

    def _make_room(self, num_bytes: int) -> None:
        """Evict idle models until `num_bytes` fit; a first model is always tried."""
        num_before = len(self.loaded)
        try:
            while self.loaded and self._held_bytes() + num_bytes > self._max_bytes:
                self._evict(self._least_used())
        finally:
            if len(self.loaded) < num_before:
                memory.give_back()  # here nothing refers to what was evicted

    def _held_bytes(self) -> int:
        return sum(loaded.held_bytes for loaded in self.loaded.values())

    def _least_used(self) -> Weights:
        idle = {weights: one.used_s for weights, one in self.loaded.items() if not one.users}
        if not idle:
            raise ModelMemoryFull("all models in memory are in use; try again later")
        return min(idle, key=idle.__getitem__)

    def _evict(self, weights: Weights) -> None:
        loaded = self.loaded.pop(weights)
        if loaded.base is not None:
            self.leaving.append(loaded)
            self.release(loaded.base)


def _share(given_gb: float | None, model_bytes: float) -> float:
    return ADAPTER_SHARE * model_bytes if given_gb is None else given_gb * 2**30


def _fetch(weights: Weights) -> Weights:
    """The same weights as files of this machine."""
    for word in weights.words:
        words_file(word)
    given = {name: getattr(weights, name) for name in ("uri", "config", "base")}
    here = {name: storage.to_local(uri) for name, uri in given.items() if uri is not None}
    return replace(weights, **here)


def _size_of(source: SourceConfig) -> int:
    """The size of a model's files, about what it will take in memory; fetches it first."""
    path = find_weights(source).path
    files = [path] if path.is_file() else path.glob("*/*.safetensors")
    return sum(file.stat().st_size for file in files)


def translate_error(error: BaseException) -> BaseException:
    """Why a model could not be loaded: a BadInput for ever, other errors for now."""
    if isinstance(error, torch.OutOfMemoryError | OutOfMemory):
        return ModelMemoryFull(
            "the model does not fit in memory beside the others; try again later"
        )
    is_temporary = isinstance(error, storage.Unavailable | ModelMemoryFull)
    if is_temporary or not isinstance(error, Exception):
        return error
    return BadInput(f"the model cannot be loaded: {first_line(error)}")


def _num_bytes(model: Model, shares_parts: bool) -> int:
    """Bytes of its weights; of its text encoders only, where it shares the other parts."""
    parts = model.text_encoders if shares_parts else [model.unet, model.vae, *model.text_encoders]
    return sum(p.nbytes for part in parts for p in part.parameters())
