"""The HTTP door: routes, who may pass, uploads, and errors in one shape.

Owns what is HTTP and nothing else: asks, answers and the fleet do the work. Routes lie directly on
the app.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from rayjobs.images.sandbox import SandboxPool
from serve import images, metrics
from serve.config import KeyConfig, ServeConfig
from serve.errors import ApiError
from serve.images import BadImage
from serve.ingress.answers import Answers
from serve.ingress.asks import Asks, describe
from serve.ingress.auth import Gate
from serve.ingress.bodies import MOST_JSON_BYTES, Envelope, read_form, read_json
from serve.ingress.schemas import EditBody, ErrorOut, GenerateBody, ImagesOut, json_schema, parse
from serve.protocol import Ask, Event
from serve.registry import Registry

WEB = Path(__file__).parents[1] / "web"
UPLOADS_AT_ONCE = 2
"""Uploads decoded at once; each takes a process of its own."""
STREAM_HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorOut} for status in (400, 401, 403, 404, 413, 429, 500, 503, 504)
}


class Engines(Protocol):
    """What the door needs of the engine replicas."""

    def events(self, ask: Ask, streamed: bool) -> AsyncIterator[Event]: ...
    async def states(self) -> dict[str, dict[str, Any]]: ...


class Door:
    """One request's way: key, body, ask, answer."""

    def __init__(self, config: ServeConfig, engines: Engines):
        self.config = config
        self.engines = engines
        self.registry = Registry(config)
        self.registry.watch()
        self.names = ThreadPoolExecutor(2, thread_name_prefix="names")
        """Apart from pictures: names may have to be looked up on storage, which may be slow."""
        self.asks = Asks(config, self.registry)
        self.gate = Gate(config.auth)
        self.answers = Answers(config.results)
        self.sandboxes = SandboxPool(UPLOADS_AT_ONCE)

    def identify(self, request: Request) -> KeyConfig | str:
        host = request.client.host if request.client else None
        return self.gate.identify(request.headers.get("authorization"), host)

    async def generate(self, request: Request) -> Response:
        who, request_id = self.identify(request), request.state.request_id
        with ExitStack() as held:
            held.enter_context(self.gate.admitted(who))
            body = parse(GenerateBody, await read_json(request))
            await self._learn(body.model)
            await self.look_up(self.asks.check, body)
            ask = await self.look_up(self.asks.generation, body, _name(who), request_id)
            self.gate.take(who, len(ask.seeds))
            return await self._answer(held, body, ask, "image_generation")

    async def edit(self, request: Request) -> Response:
        who, request_id = self.identify(request), request.state.request_id
        with ExitStack() as held:
            held.enter_context(self.gate.admitted(who))
            files, values = await read_form(request)
            body = parse(EditBody, values)
            await self._learn(body.model)
            await self.look_up(self.asks.check, body)
            image, mask = await self._in_thread(self._pictures, files)
            ask = await self._in_thread(self.asks.edit, body, image, mask, _name(who), request_id)
            self.gate.take(who, len(ask.seeds))
            return await self._answer(held, body, ask, "image_edit")

    async def models(self) -> list[dict[str, Any]]:
        await self.look_up(self.registry.refresh)
        held = await self.held()
        entries = sorted(self.registry.entries(), key=lambda entry: entry.kind, reverse=True)
        return [describe(entry, self.config.limits, entry.name in held) for entry in entries]

    async def held(self) -> set[str]:
        """Names of what is in some replica's memory; what they tell of it is kept."""
        states = await self.engines.states()
        for state in states.values():
            self.registry.learn(state["facts"])
        return {name for state in states.values() for name in state["names"]}

    async def _learn(self, model: str | None) -> None:
        """Have a model's sizes known, where only the replicas that hold it can tell them."""
        entry = await self.look_up(self.asks.entry, model)
        if entry.facts.family is None:
            await self.held()

    async def _answer(self, held: ExitStack, body: Any, ask: Ask, kind: str) -> Response:
        """The whole answer, or a stream that takes over what is `held` for this request."""
        events = self.engines.events(ask, bool(body.stream))
        if not body.stream:
            return JSONResponse(await self.answers.whole(body, ask, events))
        first = await anext(events, None)
        # A refusal that comes before anything else is still an HTTP status.
        failure = self.answers.refusal(first)
        if failure is not None:
            raise failure
        stream = self.answers.stream(body, ask, _chained(first, events), kind)
        return StreamingResponse(
            _within(held.pop_all(), stream), media_type="text/event-stream", headers=STREAM_HEADERS
        )

    def _pictures(self, files: dict[str, list[bytes]]) -> tuple[Any, Any]:
        """The image and the mask of a form, decoded; OpenAI allows several images, we one."""
        limits = self.config.limits
        sent = files.get("image", []) + files.get("image[]", [])
        masks = files.get("mask", [])
        if not sent:
            code = "missing_required_parameter"
            raise ApiError(400, "Missing required parameter: 'image'.", param="image", code=code)
        if len(sent) > 1 or len(masks) > 1:
            param = "image" if len(sent) > 1 else "mask"
            raise ApiError(400, f"Send one {param}; this model reads no more.", param=param)
        bounds = (limits.max_upload_bytes, limits.max_upload_pixels)
        image = images.read_image(sent[0], "image", *bounds, self.sandboxes.decode)
        if not masks:
            return image, None
        size = (image.width, image.height)
        return image, images.read_mask(masks[0], size, *bounds, self.sandboxes.decode)

    async def look_up(self, work: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.names, work, *args)

    async def _in_thread(self, work: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.answers.pool, work, *args)


def create_app(config: ServeConfig, engines: Engines, stamps_ids: bool = True) -> FastAPI:
    """The ASGI application of one ingress replica.

    Ray Serve's proxy puts the request's id on the answer itself: then it is not to be stamped.
    """
    door = Door(config, engines)
    app = FastAPI(title="rayjobs", version="1", docs_url="/docs", redoc_url=None)
    if "text-to-image" in config.serves:
        _add_generations(app, door)
    if "image-to-image" in config.serves:
        _add_edits(app, door)
    _add_models(app, door)
    _add_operations(app, door)
    _add_page(app)
    _add_errors(app)
    limits = config.limits
    most = 2 * limits.max_upload_bytes + MOST_JSON_BYTES
    app.add_middleware(Envelope, most_bytes=most, stamps_ids=stamps_ids)
    return app


def _add_generations(app: FastAPI, door: Door) -> None:
    body = {"application/json": {"schema": json_schema(GenerateBody)}}

    @app.post(
        "/v1/images/generations",
        response_model=ImagesOut,
        responses=ERRORS,
        openapi_extra={"requestBody": {"required": True, "content": body}},
    )
    async def generations(request: Request) -> Response:
        return await door.generate(request)


def _add_edits(app: FastAPI, door: Door) -> None:
    schema = json_schema(EditBody)
    binary = {"type": "string", "format": "binary"}
    schema["properties"] |= {"image": binary, "mask": binary}
    schema["required"] = [*schema["required"], "image"]
    body = {"multipart/form-data": {"schema": schema}}

    @app.post(
        "/v1/images/edits",
        response_model=ImagesOut,
        responses=ERRORS,
        openapi_extra={"requestBody": {"required": True, "content": body}},
    )
    async def edits(request: Request) -> Response:
        return await door.edit(request)


def _add_models(app: FastAPI, door: Door) -> None:
    @app.get("/v1/models", responses=ERRORS)
    async def models(request: Request) -> dict[str, Any]:
        door.identify(request)
        return {"object": "list", "data": await door.models()}

    @app.get("/v1/models/{model}", responses=ERRORS)
    async def model(request: Request, model: str) -> dict[str, Any]:
        door.identify(request)
        await door.look_up(door.registry.find, model)
        found = [each for each in await door.models() if each["id"] == model]
        if not found:
            message = f"The model {model!r} does not exist."
            raise ApiError(404, message, param="model", code="model_not_found")
        return found[0]


def _add_operations(app: FastAPI, door: Door) -> None:
    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether this ingress answers."""
        return {"status": "ok"}

    @app.get("/ready", responses=ERRORS)
    async def ready() -> dict[str, Any]:
        """Whether a picture can be had: by a replica that is there, or by one that will come."""
        states = await door.engines.states()
        if not states and door.config.scaling.min > 0:
            raise ApiError(503, "no engine replica is ready", retry_after_s=5.0)
        return {"status": "ready", "replicas": len(states)}

    @app.get("/metrics")
    async def prometheus(request: Request) -> Response:
        door.identify(request)
        states = await door.engines.states()
        text = metrics.merge({name: state["metrics"] for name, state in states.items()})
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_page(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(WEB / "index.html")

    app.mount("/web", StaticFiles(directory=WEB), name="web")


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def told(_: Request, error: ApiError) -> Response:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(BadImage)
    async def bad_image(_: Request, error: BadImage) -> Response:
        found = ApiError(400, str(error), param=error.param, code="invalid_image")
        return JSONResponse(found.body, found.status, found.headers)

    @app.exception_handler(HTTPException)
    async def plain(_: Request, error: HTTPException) -> Response:
        found = ApiError(error.status_code, str(error.detail))
        headers = {**(error.headers or {}), **found.headers}
        return JSONResponse(found.body, found.status, headers)

    @app.exception_handler(Exception)
    async def broken(_: Request, error: Exception) -> Response:
        found = ApiError(500, "the server has failed", code="internal_error")
        return JSONResponse(found.body, found.status, found.headers)


def _name(who: KeyConfig | str) -> str:
    return who.name if isinstance(who, KeyConfig) else who


async def _chained(first: Event | None, rest: AsyncIterator[Event]) -> AsyncIterator[Event]:
    if first is not None:
        yield first
    async for event in rest:
        yield event


async def _within(stack: ExitStack, stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """A stream that counts as a request to its end."""
    with stack:
        async for data in stream:
            yield data
