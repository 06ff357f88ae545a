"""The HTTP side: `/v1/chat/completions`, `/v1/models`, `/health`, `/metrics`.

A request passes key and type (here), its body and admission control (limits.py), and is answered
(service.py); whatever is wrong with it is an APIError.
"""

import asyncio
import gc
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Annotated

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect

from inference.flags import ServerFlags
from inference.server.limits import Deadline
from inference.server.metrics import Metrics
from inference.server.schema import APIError
from inference.server.service import Service

DRAIN_SECONDS = 2  # for the rest of a body that is refused


def build_app(flags: ServerFlags) -> FastAPI:
    """Loads the model. Raises ValueError, with the fix, where it can't be loaded."""
    metrics, bearer = Metrics(), HTTPBearer(auto_error=False)
    service = Service(flags.load_model(), flags, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        # What is loaded stays: to look through all of it for garbage takes half a second each time,
        # during which nobody is answered.
        gc.collect()
        gc.freeze()
        yield
        await service.stop()

    # No page of documentation: it would load scripts from another host.
    app = FastAPI(title="Cinego", lifespan=lifespan, openapi_url=None)
    app.add_middleware(Deadline, seconds=flags.request_timeout, metrics=metrics)
    # A name that a web page has made lead to this machine isn't one of its own.
    hosts = ["127.0.0.1", "localhost", "[::1]"] if flags.is_local else ["*"]
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts)

    async def check_key(request: Request) -> None:
        given = await bearer(request)
        token = given.credentials if given else ""
        if flags.api_key and not secrets.compare_digest(token.encode(), flags.api_key.encode()):
            challenge = {"WWW-Authenticate": "Bearer"}
            raise APIError(401, "wrong or missing API key", "invalid_api_key", headers=challenge)

    async def check_json(request: Request) -> None:
        given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if given != "application/json":
            # A web page may send other types to this server without its user's browser asking.
            raise APIError(415, "send the request as Content-Type: application/json")

    @app.exception_handler(APIError)
    async def api_error(request: Request, error: APIError) -> JSONResponse:
        # Most clients send all of a body before they look at the answer, and closing the connection
        # in the midst of that would take the answer from them. RuntimeError: it was read.
        if "content-length" in request.headers and "expect" not in request.headers:
            with suppress(TimeoutError, ClientDisconnect, RuntimeError):
                async with asyncio.timeout(DRAIN_SECONDS):
                    async for _ in request.stream():
                        pass
        return JSONResponse(error.body(), error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        found = f"{request.method} {request.url.path}: {error.detail}"
        return JSONResponse(APIError(error.status_code, found).body(), error.status_code)

    @app.exception_handler(Exception)
    async def internal_error(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(APIError(500, "internal error", "internal_error").body(), 500)

    @app.get("/health")
    async def health():
        if not service.scheduler.is_healthy:
            raise APIError(503, "the model's thread or device has died", "unhealthy")
        return {"status": "ok"}

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    about = {"id": flags.model_name, "object": "model", "owned_by": "cinego"}
    about["created"] = int(time.time())

    @app.get("/v1/models", dependencies=[Depends(check_key)])
    async def models():
        return {"object": "list", "data": [about]}

    @app.get("/v1/models/{name:path}", dependencies=[Depends(check_key)])
    async def one_model(name: str):
        service.check_model(name)
        return about

    async def until_the_end() -> AsyncIterator[AsyncExitStack]:
        async with AsyncExitStack() as stack:
            yield stack

    checks = [Depends(check_key), Depends(check_json)]

    @app.post("/v1/chat/completions", dependencies=checks)
    async def chat_completions(
        request: Request, held: Annotated[AsyncExitStack, Depends(until_the_end)]
    ) -> Response:
        try:
            return await service.answer(request, held)
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it; nginx's code in the metrics

    return app
