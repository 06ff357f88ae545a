"""The HTTP side: `/v1/chat/completions`, `/v1/models`, `/health`, `/metrics`.

A request's way: `Gate` (key, room, deadline) → `read_body` → `ChatRequest.parse` → each visual
opened and decoded → a `Job` for the model's thread → its text as JSON or as server-sent events.
"""

import asyncio
import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import BinaryIO

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from dataset.conversation import ConversationError, encode
from dataset.video import VideoError
from inference import Answerer
from inference.server.batching import Batcher, Finished, Job
from inference.server.media import MediaSource, path_of
from inference.server.metrics import Metrics
from inference.server.schema import (
    APIError,
    ChatRequest,
    Reply,
    VideoPart,
    as_conversation,
    usage_of,
)
from inference.server.settings import Settings
from model.generate import Sampling

BODIES_AT_ONCE = 8  # full-sized ones that may be in memory together, whatever waits
DRAIN_SECONDS = 2  # for the rest of a body that is refused
CHAT = "/v1/chat/completions"


def build_app(settings: Settings) -> FastAPI:
    """Loads the model. Raises ValueError, with the mend, where it can't be."""
    answerer = Answerer.load(
        settings.load_from,
        settings.vision_path,
        settings.tokenizer_path,
        settings.num_frames,
        settings.device,
        weights=settings.weights,
    )
    metrics = Metrics()
    service = Service(answerer, settings, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        service.batcher.start()
        yield
        await asyncio.to_thread(service.batcher.stop)
        await service.source.close()
        service.decoders.shutdown(cancel_futures=True)

    # No page of documentation: it would load scripts from another host.
    app = FastAPI(title="Cinego", lifespan=lifespan, openapi_url=None)
    app.add_middleware(Gate, settings=settings, metrics=metrics)
    # A name that a web page has made lead to this machine isn't one of its own.
    hosts = ["127.0.0.1", "localhost", "[::1]"] if settings.is_local else ["*"]
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts)
    created = int(time.time())

    @app.exception_handler(APIError)
    async def api_error(request: Request, error: APIError) -> JSONResponse:
        return JSONResponse(error.body(), error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        error = APIError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
        return JSONResponse(error.body(), error.status)

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(APIError(500, "internal error", "internal_error").body(), 500)

    @app.get("/health")
    async def health():
        if not service.batcher.thread.is_alive():
            raise APIError(503, "the model's thread has ended", "unhealthy")
        return {"status": "ok"}

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    about = {"id": settings.model_name, "object": "model", "created": created, "owned_by": "cinego"}

    @app.get("/v1/models")
    async def models():
        return {"object": "list", "data": [about]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str):
        service.check_model(name)
        return about

    @app.post(CHAT)
    async def chat_completions(request: Request):
        return await service.chat(request)

    return app


class Gate:
    """Before anything is read: the key, whether there is room, and how long it may all take."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics):
        self.app, self.settings, self.metrics = app, settings, metrics
        self.in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            return await self.app(scope, receive, send)
        status = 0

        async def watched(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        begun, headers = time.perf_counter(), dict(scope["headers"])
        try:
            self._check_key(headers)
            if scope["path"] != CHAT or scope["method"] != "POST":
                return await self.app(scope, receive, watched)
            if headers.get(b"content-type", b"").partition(b";")[0].strip() != b"application/json":
                # A web page may send other types to this server without its user's browser asking.
                raise APIError(415, "send the request as Content-Type: application/json")
            if self.in_flight >= self.settings.max_queue:
                raise busy("the server is full; try again")
            self.in_flight += 1
            try:
                async with asyncio.timeout(self.settings.request_timeout):
                    await self.app(scope, receive, watched)
            finally:
                self.in_flight -= 1
        except TimeoutError:
            # A stream that has begun is cut: its reader was too slow, or the answer too long.
            limit = self.settings.request_timeout
            error = APIError(504, f"no answer within {limit:g} s", "timeout")
            if status == 0:
                await JSONResponse(error.body(), error.status)(scope, receive, watched)
        except APIError as error:
            await _drain(receive, headers, 4 * int(self.settings.max_body_mb * 2**20))
            response = JSONResponse(error.body(), error.status, error.headers)
            await response(scope, receive, watched)
        except Exception:  # counted only: uvicorn logs it and answers 500
            status = status or 500
            raise
        finally:
            self.metrics.in_flight.set(self.in_flight)
            self.metrics.requests.labels(str(status or 499)).inc()
            self.metrics.seconds.observe(time.perf_counter() - begun)

    def _check_key(self, headers: dict[bytes, bytes]) -> None:
        key = self.settings.api_key
        if key is None:
            return
        given = headers.get(b"authorization", b"").removeprefix(b"Bearer ")
        # Digests are of one length, and comparing them takes the same time wherever they differ.
        digests = (hashlib.sha256(text).digest() for text in (given, key.encode()))
        if not hmac.compare_digest(*digests):
            challenge = {"WWW-Authenticate": "Bearer"}
            raise APIError(401, "wrong or missing API key", "invalid_api_key", headers=challenge)


async def _drain(receive: Receive, headers: dict[bytes, bytes], most: int) -> None:
    """Reads what is left of a refused body. Most clients send all of it before they look at the
    answer, and closing the connection in the midst of that would take the answer from them."""
    if b"expect" in headers:  # this one asks first
        return
    with suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_SECONDS):
            while (message := await receive())["type"] == "http.request":
                most -= len(message["body"])
                if most < 0 or not message["more_body"]:
                    return


def busy(message: str) -> APIError:
    return APIError(503, message, "server_busy", headers={"Retry-After": "1"})


class Service:
    def __init__(self, answerer: Answerer, settings: Settings, metrics: Metrics):
        self.answerer, self.settings, self.metrics = answerer, settings, metrics
        self.batcher = Batcher(answerer, metrics, settings.max_batch, settings.batch_wait_ms / 1e3)
        self.max_body = int(settings.max_body_mb * 2**20)
        self.body_bytes = 0  # of all requests that are being read or decoded
        self.source = MediaSource(
            self.max_body,
            settings.media_timeout,
            settings.allowed_media_path,
            frozenset(settings.allowed_media_domains or ()),
        )
        # Each of its threads has a process that decodes (dataset/video.py).
        self.decoders = ThreadPoolExecutor(settings.decoders, "decoder")
        # Text above this is too long however it is cut into tokens, and needn't be.
        longest = max(map(len, answerer.tokenizer.get_vocab()))
        self.max_characters = longest * settings.max_prompt_tokens

    def check_model(self, name: str) -> None:
        if name != self.settings.model_name:
            raise APIError(404, f"the model {name[:100]!r} isn't here", "model_not_found", "model")

    async def chat(self, request: Request) -> Response:
        try:
            with self._upload() as count:
                body = await self._read_body(request, count)
                async with _unless_gone(request):
                    chat = ChatRequest.parse(body)
                    del body
                    job = await self._job(chat)
            # Only these are needed from here on: the uploads in `chat` aren't held any longer.
            streams, options = chat.stream, chat.stream_options
            del chat
            with_usage = bool(options and options.include_usage)
            return await self._answer(request, job, bool(streams), with_usage)
        except ClientDisconnect:
            self.metrics.left.inc()
            return Response(status_code=499)  # nobody reads it; nginx's code in the metrics

    # ---- from a body to a job

    @contextmanager
    def _upload(self) -> Iterator[Callable[[int], None]]:
        """Counts the bytes of a body for as long as it, or what is in it, is held."""
        held = 0

        def count(more: int) -> None:
            nonlocal held
            if held + more > self.max_body:
                mib = self.settings.max_body_mb
                raise APIError(413, f"the request is above {mib:g} MiB", "body_too_large")
            if self.body_bytes + more > BODIES_AT_ONCE * self.max_body:
                raise busy("too much is being uploaded; try again")
            held, self.body_bytes = held + more, self.body_bytes + more

        try:
            yield count
        finally:
            self.body_bytes -= held

    async def _read_body(self, request: Request, count: Callable[[int], None]) -> bytes:
        announced = request.headers.get("content-length", "0")
        chunks = []
        try:
            if announced.isdecimal() and int(announced) > self.max_body:
                count(int(announced))  # refused before the first byte
            async with asyncio.timeout(self.settings.upload_timeout):
                async for chunk in request.stream():
                    count(len(chunk))
                    chunks.append(chunk)
        except APIError:
            del chunks
            await _drain(request.receive, dict(request.scope["headers"]), 4 * self.max_body)
            raise
        except TimeoutError:
            limit = self.settings.upload_timeout
            raise APIError(408, f"the request didn't arrive within {limit:g} s") from None
        return b"".join(chunks)

    async def _job(self, chat: ChatRequest) -> Job:
        """Raises APIError for whatever is wrong with the request: the model's thread sees none."""
        self.check_model(chat.model)
        turns, parts = as_conversation(chat.messages)
        if len(parts) > self.settings.max_visuals:
            most = self.settings.max_visuals
            found = f"{len(parts)} visuals are above the {most} of a request"
            raise APIError(400, found, "too_many_visuals", "messages")
        if sum(len(turn["content"]) for turn in turns) > self.max_characters:
            raise self._too_many_tokens("more than")
        clips = []
        for number, part in enumerate(parts, 1):
            url = part.video_url.url if isinstance(part, VideoPart) else part.image_url.url
            try:
                clips.append(await self._see(url))
            except APIError as error:
                error.message = f"visual {number} of {len(parts)}: {error.message}"
                error.param = "messages"
                self.metrics.media.labels(error.code or "refused").inc()
                raise
            self.metrics.media.labels("read").inc()
        num_tokens = self.answerer.model.config.tokens_per_visual
        lengths = [num_tokens(len(clip)) for clip in clips]
        try:
            prompt = encode(self.answerer.tokenizer, turns, lengths, add_generation_prompt=True)
        except ConversationError as error:
            raise APIError(400, str(error), None, "messages") from None
        if len(prompt.input_ids) > self.settings.max_prompt_tokens:
            raise self._too_many_tokens(f"{len(prompt.input_ids)} tokens are above")
        given = (chat.max_completion_tokens, chat.max_tokens, self.settings.default_new_tokens)
        longest = next(number for number in given if number is not None)
        temperature = self.settings.temperature if chat.temperature is None else chat.temperature
        sampling = Sampling(
            max_new_tokens=min(longest, self.settings.max_new_tokens),
            # Numbers so small that nothing would be left to draw from mean the likeliest token.
            temperature=temperature if temperature > 1e-3 else 0.0,
            top_p=1.0 if chat.top_p is None else max(chat.top_p, 1e-6),
            seed=None if chat.seed is None else chat.seed % 2**63,
        )
        return Job(turns, clips, sampling, tuple(stop for stop in chat.stop or () if stop))

    def _too_many_tokens(self, found: str) -> APIError:
        limit = f"{found} the {self.settings.max_prompt_tokens} tokens that a prompt may have"
        return APIError(400, limit, "context_length_exceeded", "messages")

    async def _see(self, url: str) -> np.ndarray:
        file = await self.source.open(url)
        return await asyncio.get_running_loop().run_in_executor(self.decoders, self._decode, file)

    def _decode(self, file: BinaryIO) -> np.ndarray:
        """(F, S, S, 3) uint8 frames at the tower's size; raises APIError with the reason."""
        limits = self.settings.media_limits(self.answerer.num_frames)
        # Closed here, not by a reader who may have left: its number must not become another's file
        # while it is being decoded.
        with file:
            try:
                clip = self.answerer.decode(path_of(file), **limits)
            except VideoError as error:
                detail = error.detail.replace(error.path, "the file")  # its path means nothing
                found = f"{error.reason}: {detail}"
                raise APIError(400, found, f"media_{error.reason}") from None
        return self.answerer.transform.resize_frames(clip.frames)

    # ---- from a job to an answer

    async def _answer(
        self, request: Request, job: Job, streams: bool, with_usage: bool
    ) -> Response:
        reply = Reply(self.settings.model_name)
        self.batcher.submit(job)
        try:
            async with _unless_gone(request):
                # A failure before the first word still has a status of its own.
                first = await job.next()
                if not streams:
                    text, event = "", first
                    while isinstance(event, str):
                        text, event = text + event, await job.next()
                    return JSONResponse(reply.whole(text, event.reason, _usage(event)))
        except BaseException:
            job.cancelled = True
            raise
        return _EventStream(job, self._events(job, first, reply, with_usage), self.metrics)

    async def _events(
        self, job: Job, event: str | Finished, reply: Reply, with_usage: bool
    ) -> AsyncIterator[str]:
        usage = {"usage": None} if with_usage else {}  # in every chunk, as OpenAI has it
        yield _sse(reply.chunk({"role": "assistant", "content": ""}, **usage))
        try:
            while isinstance(event, str):
                yield _sse(reply.chunk({"content": event}, **usage))
                event = await job.next()
            yield _sse(reply.chunk({}, event.reason, **usage))
            if with_usage:
                yield _sse(reply.last_chunk(_usage(event)))
        except APIError as error:
            yield _sse(error.body())
        yield "data: [DONE]\n\n"


class _EventStream(StreamingResponse):
    """Whatever ends it, a reader who left or a deadline, ends the work on its job, too."""

    def __init__(self, job: Job, events: AsyncIterator[str], metrics: Metrics):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self.job, self.metrics = job, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            if not self.job.ended:
                self.job.cancelled = True
                self.metrics.left.inc()


@asynccontextmanager
async def _unless_gone(request: Request) -> AsyncIterator[None]:
    """Ends what is inside, by ClientDisconnect, as soon as the client has hung up."""
    inside, gone = asyncio.current_task(), False

    async def watch() -> None:
        nonlocal gone
        while (await request.receive())["type"] != "http.disconnect":
            pass
        gone = True
        inside.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if gone and inside.uncancel() == 0:
            raise ClientDisconnect from None
        raise
    finally:
        watcher.cancel()


def _sse(chunk: dict) -> str:
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"


def _usage(end: Finished) -> dict:
    return usage_of(end.prompt_tokens, end.completion_tokens)
