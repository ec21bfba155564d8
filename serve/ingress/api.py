"""The HTTP API: routes, and errors in one format.

Owns only what is HTTP: `ImagesApi` and the engine replicas do the work. Routes are added to the app
directly, because routers have broken under Ray Serve.
"""

from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from serve.config import ServeConfig
from serve.errors import ApiError
from serve.images import BadImage
from serve.ingress.bodies import MAX_JSON_BYTES
from serve.ingress.guard import PageGuard
from serve.ingress.images_api import ImagesApi
from serve.ingress.middleware import RequestMiddleware
from serve.ingress.schemas import EditBody, ErrorOut, GenerateBody, ImagesOut, json_schema

WEB = Path(__file__).parents[1] / "web"
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorOut} for status in (400, 401, 403, 404, 408, 413, 429, 500, 503, 504)
}
READABLE_HEADERS = ("x-request-id", "retry-after", "retry-after-ms", "x-should-retry")


def create_app(config: ServeConfig, api: ImagesApi, adds_ids: bool = True) -> FastAPI:
    """The ASGI application of one ingress replica.

    Ray Serve's proxy adds the request id to responses itself: then `adds_ids` is False.
    """
    app = FastAPI(title="rayjobs", version="1", docs_url=None, redoc_url=None)
    if "text-to-image" in config.serves:
        _add_generations(app, api)
    if "image-to-image" in config.serves:
        _add_edits(app, api)
    _add_models(app, api)
    _add_operations(app, api)
    _add_page(app)
    _add_errors(app)
    # The last one added is the first to see a request.
    app.add_middleware(PageGuard, config=config.auth)
    if config.auth.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.auth.origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=READABLE_HEADERS,
        )
    max_bytes = 2 * config.limits.max_upload_bytes + MAX_JSON_BYTES
    app.add_middleware(RequestMiddleware, max_bytes=max_bytes, adds_ids=adds_ids)
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
        return await api.model(model)

    @app.get("/v1/load", responses=ERRORS)
    async def load(request: Request) -> dict[str, Any]:
        """Pictures in progress and waiting, and replicas that have it in memory, by model."""
        api.identify(request)
        return {"object": "list", "data": await api.load()}


def _add_operations(app: FastAPI, api: ImagesApi) -> None:
    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether this ingress answers."""
        return {"status": "ok"}

    @app.get("/ready", responses=ERRORS)
    async def ready() -> dict[str, Any]:
        """Whether images can be made: by a running replica, or by one that will be started."""
        if api.is_draining:
            raise ApiError(503, "this server is stopping", code="stopping", retry_after_s=5.0)
        states = await api.engines.states()
        if not states and api.config.scaling.min > 0:
            raise ApiError(503, "no engine replica is ready", retry_after_s=5.0)
        return {"status": "ready", "replicas": len(states)}

    @app.get("/metrics")
    async def prometheus(request: Request) -> Response:
        api.identify(request)
        text = await api.metrics_text()
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_page(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(WEB / "index.html")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return FileResponse(WEB / "docs.html")

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
