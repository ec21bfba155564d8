"""The HTTP API: routes, authentication, uploads, and errors in one format.

Owns only what is HTTP: the request builder, the response encoder and the engine replicas do the
work. Routes are added to the app directly, because routers have broken under Ray Serve.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.sse import EventSourceResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from rayjobs.images.sandbox import SandboxPool
from serve import images, metrics
from serve.config import KeyConfig, ServeConfig
from serve.errors import ApiError, translate_failure
from serve.images import BadImage
from serve.ingress.auth import ApiKeys
from serve.ingress.bodies import MAX_JSON_BYTES, RequestLimitsMiddleware, read_form, read_json
from serve.ingress.requests import ImagesRequestBuilder, describe
from serve.ingress.responses import ResponseEncoder
from serve.ingress.schemas import EditBody, ErrorOut, GenerateBody, ImagesOut, json_schema, parse
from serve.protocol import Event, Failed, ImagesRequest
from serve.registry import Registry

WEB = Path(__file__).parents[1] / "web"
UPLOADS_AT_ONCE = 2
"""Uploads decoded at once; each takes a process of its own."""
STREAM_HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorOut} for status in (400, 401, 403, 404, 413, 429, 500, 503, 504)
}


class Engines(Protocol):
    """What the API needs of the engine replicas."""

    def events(self, request: ImagesRequest, streamed: bool) -> AsyncIterator[Event]: ...
    async def states(self) -> dict[str, dict[str, Any]]: ...


class ImagesApi:
    """Answers one HTTP request: key, body, images request, response."""

    def __init__(self, config: ServeConfig, engines: Engines):
        self.config = config
        self.engines = engines
        self.registry = Registry(config)
        self.registry.watch()
        self.lookups = ThreadPoolExecutor(2, thread_name_prefix="lookups")
        """Apart from image threads: a name may be looked up on storage, which may be slow."""
        self.builder = ImagesRequestBuilder(config, self.registry)
        self.keys = ApiKeys(config.auth)
        self.responses = ResponseEncoder(config.results)
        self.sandboxes = SandboxPool(UPLOADS_AT_ONCE)

    def identify(self, request: Request) -> KeyConfig | str:
        host = request.client.host if request.client else None
        return self.keys.identify(request.headers.get("authorization"), host)

    async def generate(self, request: Request) -> Response:
        who, request_id = self.identify(request), request.state.request_id
        with ExitStack() as stack:
            stack.enter_context(self.keys.count_request(who))
            body = parse(GenerateBody, await read_json(request))
            await self._load_facts(body.model)
            await self.look_up(self.builder.check, body)
            images_request = await self.look_up(
                self.builder.build_generation, body, _caller(who), request_id
            )
            self.keys.take_images(who, len(images_request.seeds))
            return await self._respond(stack, body, images_request, "image_generation")

    async def edit(self, request: Request) -> Response:
        who, request_id = self.identify(request), request.state.request_id
        with ExitStack() as stack:
            stack.enter_context(self.keys.count_request(who))
            files, values = await read_form(request)
            body = parse(EditBody, values)
            await self._load_facts(body.model)
            await self.look_up(self.builder.check, body)
            image, mask = await self._in_thread(self._decode_uploads, files)
            images_request = await self._in_thread(
                self.builder.build_edit, body, image, mask, _caller(who), request_id
            )
            self.keys.take_images(who, len(images_request.seeds))
            return await self._respond(stack, body, images_request, "image_edit")

    async def models(self) -> list[dict[str, Any]]:
        await self.look_up(self.registry.refresh)
        loaded = await self.loaded_names()
        entries = sorted(self.registry.entries(), key=lambda entry: entry.kind, reverse=True)
        return [describe(entry, self.config.limits, entry.name in loaded) for entry in entries]

    async def loaded_names(self) -> set[str]:
        """Names of models and adapters in some replica's memory; facts about them are kept."""
        states = await self.engines.states()
        for state in states.values():
            self.registry.add_facts(state["facts"])
        return {name for state in states.values() for name in state["names"]}

    async def _load_facts(self, model: str | None) -> None:
        """Get a model's sizes from the replicas, where its files are not readable here."""
        entry = await self.look_up(self.builder.entry, model)
        if entry.facts.family is None:
            await self.loaded_names()

    async def _respond(
        self, stack: ExitStack, body: Any, images_request: ImagesRequest, kind: str
    ) -> Response:
        """A JSON response, or a stream that takes over the `stack`'s contexts."""
        events = self.engines.events(images_request, bool(body.stream))
        if not body.stream:
            return JSONResponse(await self.responses.whole(body, images_request, events))
        first = await anext(events, None)
        # A failure before any other event is still sent as an HTTP status.
        if isinstance(first, Failed):
            raise translate_failure(first)
        stream = self.responses.stream(body, images_request, _chain(first, events), kind)
        return EventSourceResponse(_with_context(stack.pop_all(), stream), headers=STREAM_HEADERS)

    def _decode_uploads(self, files: dict[str, list[bytes]]) -> tuple[Any, Any]:
        """The image and the mask of a form, decoded; unlike OpenAI's API, one image only."""
        limits = self.config.limits
        sent = files.get("image", []) + files.get("image[]", [])
        masks = files.get("mask", [])
        if not sent:
            code = "missing_required_parameter"
            raise ApiError(400, "Missing required parameter: 'image'.", param="image", code=code)
        if len(sent) > 1 or len(masks) > 1:
            param = "image" if len(sent) > 1 else "mask"
            raise ApiError(400, f"Send one {param}; this API accepts one only.", param=param)
        bounds = (limits.max_upload_bytes, limits.max_upload_pixels)
        image = images.read_image(sent[0], "image", *bounds, self.sandboxes.decode)
        if not masks:
            return image, None
        size = (image.width, image.height)
        return image, images.read_mask(masks[0], size, *bounds, self.sandboxes.decode)

    async def look_up(self, work: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.lookups, work, *args)

    async def _in_thread(self, work: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.responses.pool, work, *args)


def create_app(config: ServeConfig, engines: Engines, adds_ids: bool = True) -> FastAPI:
    """The ASGI application of one ingress replica.

    Ray Serve's proxy adds the request id to responses itself: then `adds_ids` is False.
    """
    api = ImagesApi(config, engines)
    app = FastAPI(title="rayjobs", version="1", docs_url="/docs", redoc_url=None)
    if "text-to-image" in config.serves:
        _add_generations(app, api)
    if "image-to-image" in config.serves:
        _add_edits(app, api)
    _add_models(app, api)
    _add_operations(app, api)
    _add_page(app)
    _add_errors(app)
    limits = config.limits
    max_bytes = 2 * limits.max_upload_bytes + MAX_JSON_BYTES
    app.add_middleware(RequestLimitsMiddleware, max_bytes=max_bytes, adds_ids=adds_ids)
    return app


def _add_generations(app: FastAPI, api: ImagesApi) -> None:
    body = {"application/json": {"schema": json_schema(GenerateBody)}}

    @app.post(
        "/v1/images/generations",
        response_model=ImagesOut,
        responses=ERRORS,
        openapi_extra={"requestBody": {"required": True, "content": body}},
    )
    async def generations(request: Request) -> Response:
        return await api.generate(request)


def _add_edits(app: FastAPI, api: ImagesApi) -> None:
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
        return await api.edit(request)


def _add_models(app: FastAPI, api: ImagesApi) -> None:
    @app.get("/v1/models", responses=ERRORS)
    async def models(request: Request) -> dict[str, Any]:
        api.identify(request)
        return {"object": "list", "data": await api.models()}

    @app.get("/v1/models/{model}", responses=ERRORS)
    async def model(request: Request, model: str) -> dict[str, Any]:
        api.identify(request)
        await api.look_up(api.registry.find, model)
        matches = [each for each in await api.models() if each["id"] == model]
        if not matches:
            message = f"The model {model!r} does not exist."
            raise ApiError(404, message, param="model", code="model_not_found")
        return matches[0]


def _add_operations(app: FastAPI, api: ImagesApi) -> None:
    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether this ingress answers."""
        return {"status": "ok"}

    @app.get("/ready", responses=ERRORS)
    async def ready() -> dict[str, Any]:
        """Whether images can be made: by a running replica, or by one that will be started."""
        states = await api.engines.states()
        if not states and api.config.scaling.min > 0:
            raise ApiError(503, "no engine replica is ready", retry_after_s=5.0)
        return {"status": "ready", "replicas": len(states)}

    @app.get("/metrics")
    async def prometheus(request: Request) -> Response:
        api.identify(request)
        states = await api.engines.states()
        text = metrics.merge({name: state["metrics"] for name, state in states.items()})
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_page(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(WEB / "index.html")

    app.mount("/web", StaticFiles(directory=WEB), name="web")


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> Response:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(BadImage)
    async def bad_image(_: Request, error: BadImage) -> Response:
        translated = ApiError(400, str(error), param=error.param, code="invalid_image")
        return JSONResponse(translated.body, translated.status, translated.headers)

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> Response:
        translated = ApiError(error.status_code, str(error.detail))
        headers = {**(error.headers or {}), **translated.headers}
        return JSONResponse(translated.body, translated.status, headers)

    @app.exception_handler(Exception)
    async def internal_error(_: Request, error: Exception) -> Response:
        translated = ApiError(500, "internal server error", code="internal_error")
        return JSONResponse(translated.body, translated.status, translated.headers)


def _caller(who: KeyConfig | str) -> str:
    return who.name if isinstance(who, KeyConfig) else who


async def _chain(first: Event | None, rest: AsyncIterator[Event]) -> AsyncIterator[Event]:
    if first is not None:
        yield first
    async for event in rest:
        yield event


async def _with_context(stack: ExitStack, stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """A stream that counts as one of its key's requests until it ends."""
    with stack:
        async for data in stream:
            yield data
