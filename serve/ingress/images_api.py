"""One request for images, from its key to its answer.

Owns the order of what happens, and the one deadline that covers all of it: the body, the engine,
the encoding, the storage. What may wait for others has threads of its own: names that are looked
for on storage, uploads, results. Knows no route.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Protocol

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from fastapi.sse import EventSourceResponse

from rayjobs.images.sandbox import SandboxPool
from serve import images
from serve.config import KeyConfig, ServeConfig
from serve.errors import ApiError, translate_failure
from serve.ingress import streams
from serve.ingress.auth import ApiKeys
from serve.ingress.bodies import MAX_JSON_BYTES, Form, open_form, read_json
from serve.ingress.marks import Marks
from serve.ingress.requests import NO_PICTURES, ImagesRequestBuilder, Pictures, describe
from serve.ingress.responses import ResponseEncoder, sse
from serve.ingress.results import ResultsStore
from serve.ingress.schemas import EditBody, GenerateBody, parse
from serve.limits.keeper import Limits
from serve.metrics import IngressMetrics, merge
from serve.protocol import TOO_LATE, ControlUse, Event, Failed, ImagesRequest, IpAdapterUse
from serve.registry import Registry
from serve.tracing import span

UPLOADS_AT_ONCE = 2
"""Uploads decoded at once; each takes a process of its own, and its pixels memory here."""
LOAD_EVERY_S = 1.0
INGRESS = "ingress"
"""The name, among those of replicas, of the ingress replica that answers."""
STREAM_HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}

Asked = tuple[GenerateBody, ImagesRequest]
"""A body, and the request that was built from it."""


class Engines(Protocol):
    """What the API needs of the engine replicas."""

    def events(self, request: ImagesRequest, streamed: bool) -> AsyncIterator[Event]: ...
    async def states(self) -> dict[str, dict[str, Any]]: ...


class ImagesApi:
    """Answers HTTP requests: key, body, images request, response."""

    def __init__(self, config: ServeConfig, engines: Engines, limits: Limits | None = None):
        self.config = config
        self.engines = engines
        self.registry = Registry(config)
        self.registry.watch()
        self.builder = ImagesRequestBuilder(config, self.registry)
        self.keys = ApiKeys(config.auth, limits or Limits())
        self.metrics = IngressMetrics()
        self.results = ResultsStore(config.results)
        self.responses = ResponseEncoder(self.results, Marks(config.provenance))
        self.active = 0
        """Requests for images that are being answered."""
        self.is_draining = False
        self._load: tuple[float, list[dict[str, Any]]] | None = None
        """When the replicas were asked for their load, and their states."""
        has_pictures = config.controls or config.ip_adapters
        pictures = 4 * config.limits.max_upload_bytes // 3 if has_pictures else 0
        self._max_json_bytes = MAX_JSON_BYTES + pictures
        """Of a body, whose pictures together are as large as an upload at most."""
        self._lookups = ThreadPoolExecutor(2, thread_name_prefix="lookups")
        self._uploads = ThreadPoolExecutor(UPLOADS_AT_ONCE, thread_name_prefix="uploads")
        self._sandboxes = SandboxPool(UPLOADS_AT_ONCE)

    def identify(self, request: Request) -> KeyConfig | str:
        host = request.client.host if request.client else None
        return self.keys.identify(request.headers.get("authorization"), host)

    async def generate(self, request: Request) -> Response:
        return await self._answer(request, self._read_generation, "image_generation")

    async def edit(self, request: Request) -> Response:
        return await self._answer(request, self._read_edit, "image_edit")

    async def models(self) -> list[dict[str, Any]]:
        loaded = await self.loaded_names()
        entries = sorted(self.registry.entries(), key=lambda entry: entry.kind, reverse=True)
        return [describe(entry, self.config.limits, entry.name in loaded) for entry in entries]

    async def model(self, name: str) -> dict[str, Any]:
        """A model by its name or alias. Raises ApiError 404."""
        await self.look_up(name)
        entry = self.registry.get(name)
        if entry is None:
            message = f"The model {name!r} does not exist."
            raise ApiError(404, message, param="model", code="model_not_found")
        loaded = await self.loaded_names()
        return describe(self.registry.get(name) or entry, self.config.limits, entry.name in loaded)

    async def loaded_names(self) -> set[str]:
        """Names of models and adapters in some replica's memory; facts about them are kept."""
        states = await self.engines.states()
        for state in states.values():
            self.registry.add_facts(state["facts"])
        return {name for state in states.values() for name in state["names"]}

    async def load(self) -> list[dict[str, Any]]:
        """By model or adapter, pictures in progress and waiting, and replicas that have it.

        Many pages ask: the replicas are asked once in a while.
        """
        now_s = asyncio.get_running_loop().time()
        if self._load is None or now_s > self._load[0] + LOAD_EVERY_S:
            self._load = (now_s, list((await self.engines.states()).values()))
        states = self._load[1]
        found = []
        for name in sorted(entry.name for entry in self.registry.entries()):
            rows = [state["load"].get(name, (0, 0)) for state in states]
            found.append(
                {
                    "id": name,
                    "in_progress": sum(in_progress for in_progress, _ in rows),
                    "waiting": sum(waiting for _, waiting in rows),
                    "replicas": sum(name in state["names"] for state in states),
                }
            )
        return found

    async def metrics_text(self) -> str:
        """The metrics of the engine replicas, and of this ingress replica."""
        states = await self.engines.states()
        self.metrics.set_shared(self.keys.limits.is_shared)
        texts = {name: state["metrics"] for name, state in states.items()}
        return merge(texts | {INGRESS: self.metrics.text()})

    async def look_up(self, name: str | None) -> None:
        """Look for a name that is not known yet, on storage that may be slow to answer."""
        if self.registry.get(name) is None:
            await _in(self._lookups, self.registry.find, name)

    async def _answer(
        self, request: Request, read: Callable[[Request, str], Awaitable[Asked]], kind: str
    ) -> Response:
        """Read a request and answer it, all within its deadline."""
        loop = asyncio.get_running_loop()
        arrived_s, who = loop.time(), self.identify(request)
        with ExitStack() as stack:
            stack.enter_context(self._counted())
            stack.callback(await self.keys.enter(who))
            try:
                async with asyncio.timeout(self.config.limits.max_deadline_s) as timer:
                    with span("read"):
                        body, images_request = await read(request, _caller(who))
                    until_s = arrived_s + (images_request.deadline_s or 0.0)
                    timer.reschedule(until_s)
                    await self.keys.take_images(who, len(images_request.seeds))
                    left_s = max(0.001, until_s - loop.time())
                    images_request = replace(images_request, deadline_s=left_s)
                    return await self._respond(stack, body, images_request, kind, until_s)
            except TimeoutError:
                if not timer.expired():
                    raise
                raise translate_failure(TOO_LATE) from None

    @contextmanager
    def _counted(self) -> Generator[None]:
        if self.is_draining:
            raise ApiError(503, "this server is stopping", code="stopping", retry_after_s=5.0)
        self.active += 1
        try:
            yield
        finally:
            self.active -= 1

    async def _read_generation(self, request: Request, caller: str) -> Asked:
        body = parse(GenerateBody, await read_json(request, self._max_json_bytes))
        await self._check(body)
        has_pictures = body.controls or body.ip_adapters
        pictures = await _in(self._uploads, self._pictures, body) if has_pictures else NO_PICTURES
        id = request.state.request_id
        return body, self.builder.build_generation(body, caller, id, pictures)

    def _pictures(self, body: GenerateBody) -> Pictures:
        """A request's control and reference pictures, decoded, in a thread: as few at once as
        threads."""
        limits = self.config.limits
        bounds = (limits.max_upload_bytes, limits.max_upload_pixels, self._sandboxes.decode)
        controls = tuple(
            ControlUse(
                name=use.name,
                pixels=images.read_image(use.image, "controls", *bounds),
                scale=use.scale,
                start=use.start,
                end=use.end,
                preprocess=use.preprocess,
            )
            for use in body.controls or ()
        )
        ip_adapters = tuple(
            IpAdapterUse(
                name=use.name,
                pixels=images.read_image(use.image, "ip_adapters", *bounds),
                scale=use.scale,
            )
            for use in body.ip_adapters or ()
        )
        return Pictures(controls, ip_adapters)

    async def _read_edit(self, request: Request, caller: str) -> Asked:
        async with open_form(request) as form:
            body = parse(EditBody, form.values, form.controls)
            await self._check(body)
            build = self._build_edit
            asked = await _in(self._uploads, build, body, form, caller, request.state.request_id)
        return body, replace(asked, warnings=tuple(form.warnings))

    async def _check(self, body: GenerateBody) -> None:
        """Refuse what can be refused before an image is decoded or made."""
        named = (*(body.loras or ()), *(body.controls or ()), *(body.ip_adapters or ()))
        for name in (body.model, *(use.name for use in named)):
            await self.look_up(name)
        if self.builder.entry(body.model).facts.family is None:
            await self.loaded_names()  # its files are not readable here: replicas know its size
        self.builder.check(body)
        if body.response_format == "url" and not body.stream:
            await self.results.require()

    def _build_edit(self, body: EditBody, form: Form, caller: str, id: str) -> ImagesRequest:
        """An edit with its image and mask decoded, in a thread: as few at once as threads."""
        limits = self.config.limits
        if "image" not in form.files:
            code = "missing_required_parameter"
            raise ApiError(400, "Missing required parameter: 'image'.", param="image", code=code)
        bounds = (limits.max_upload_bytes, limits.max_upload_pixels, self._sandboxes.decode)
        image = images.read_image(form.files["image"].file.read(), "image", *bounds)
        mask = None
        if "mask" in form.files:
            size = (image.width, image.height)
            mask = images.read_mask(form.files["mask"].file.read(), size, *bounds)
        return self.builder.build_edit(body, image, mask, caller, id, self._pictures(body))

    async def _respond(
        self, stack: ExitStack, body: Any, images_request: ImagesRequest, kind: str, until_s: float
    ) -> Response:
        """A JSON response, or a stream that takes over the `stack`'s contexts."""
        events = self.engines.events(images_request, bool(body.stream))
        if not body.stream:
            return JSONResponse(await self.responses.whole(body, images_request, events))
        first, events = await streams.begin(events)
        # A failure before any other event is still sent as an HTTP status.
        if isinstance(first, Failed):
            raise translate_failure(first)
        stream = self.responses.stream(body, images_request, events, kind)
        late = sse("error", translate_failure(TOO_LATE).body)
        alive = streams.keep_alive(stream, until_s, late)
        return EventSourceResponse(_with_context(stack.pop_all(), alive), headers=STREAM_HEADERS)


def _caller(who: KeyConfig | str) -> str:
    return who.name if isinstance(who, KeyConfig) else who


async def _with_context(stack: ExitStack, stream: AsyncGenerator[bytes]) -> AsyncIterator[bytes]:
    """A stream that counts as one of its key's requests until it ends."""
    with stack:
        try:
            async for data in stream:
                yield data
        finally:
            await stream.aclose()


async def _in(pool: ThreadPoolExecutor, work: Callable[..., Any], *args: Any) -> Any:
    return await asyncio.get_running_loop().run_in_executor(pool, work, *args)
