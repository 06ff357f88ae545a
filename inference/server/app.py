"""The HTTP side: `/v1/chat/completions`, `/v1/models`, `/health`, `/metrics`.

A request's way: key and type → admission → body → `ChatRequest.parse` → its visuals, decoded and
encoded → `ChatModel.make_request` → a `Sequence` for the scheduler → JSON or server-sent events.
"""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Annotated, BinaryIO
from weakref import WeakValueDictionary

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from dataset.conversation import ConversationError
from dataset.video import Frames, VideoError
from inference.chat_model import ChatModel
from inference.flags import ServerFlags
from inference.request import Sequence, Visual
from inference.scheduler import Scheduler
from inference.server.media import MediaSource, path_of
from inference.server.metrics import Metrics
from inference.server.schema import (
    JSON_MARKS,
    MAX_JSON_MARKS,
    APIError,
    ChatRequest,
    Reply,
    as_conversation,
    usage_of,
)
from model.generate import Sampling

DRAIN_SECONDS = 2  # for the rest of a body that is refused
BODIES_AT_ONCE = 8  # full-sized ones that may be in memory together, whatever waits


def build_app(flags: ServerFlags) -> FastAPI:
    """Loads the model. Raises ValueError, with the fix, where it can't be loaded."""
    metrics = Metrics()
    service = Service(flags.load_model(), flags, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        yield
        await asyncio.to_thread(service.scheduler.stop)
        await service.source.http.aclose()
        service.decoders.shutdown(cancel_futures=True)

    # No page of documentation: it would load scripts from another host.
    app = FastAPI(title="Cinego", lifespan=lifespan, openapi_url=None)
    app.add_middleware(Deadline, seconds=flags.request_timeout, metrics=metrics)
    # A name that a web page has made lead to this machine isn't one of its own.
    hosts = ["127.0.0.1", "localhost", "[::1]"] if flags.is_local else ["*"]
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts)

    async def check_key(
        given: Annotated[
            HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))
        ],
    ) -> None:
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
        await _drain(request, 4 * service.max_body)
        return JSONResponse(error.body(), error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        error = APIError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
        return JSONResponse(error.body(), error.status)

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

    checks = [Depends(check) for check in (check_key, check_json, service.admit)]

    @app.post("/v1/chat/completions", dependencies=checks)
    async def chat_completions(request: Request) -> Response:
        try:
            return await service.answer(request)
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it; nginx's code in the metrics

    return app


class Deadline:
    """How long a request may take in all; counts what became of it."""

    def __init__(self, app: ASGIApp, seconds: float, metrics: Metrics):
        self.app, self.seconds, self.metrics = app, seconds, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            return await self.app(scope, receive, send)
        status, started = 0, time.perf_counter()

        async def watched(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            async with asyncio.timeout(self.seconds):
                await self.app(scope, receive, watched)
        except TimeoutError:
            # A stream that has begun is cut: its reader was too slow, or the answer too long.
            error = APIError(504, f"no answer within {self.seconds:g} s", "timeout")
            if status == 0:
                await JSONResponse(error.body(), error.status)(scope, receive, watched)
        except Exception:  # counted only: uvicorn logs it and answers 500
            status = status or 500
            raise
        finally:
            self.metrics.requests.labels(str(status or 499)).inc()
            self.metrics.seconds.observe(time.perf_counter() - started)


class Service:
    def __init__(self, chat_model: ChatModel, flags: ServerFlags, metrics: Metrics):
        self.chat_model, self.flags, self.metrics = chat_model, flags, metrics
        self.scheduler = Scheduler(
            chat_model, flags.max_batch, flags.batch_wait_ms / 1e3, metrics.count_step
        )
        metrics.batch_rows.set_function(lambda: len(self.scheduler.engine.sequences))
        self.in_flight = 0
        self.max_body = int(flags.max_body_mb * 2**20)
        self.body_bytes = 0  # of all requests that are being read or decoded
        self.source = MediaSource(
            self.max_body,
            flags.media_timeout,
            flags.allowed_media_path,
            frozenset(flags.allowed_media_domains or ()),
        )
        # Each of its threads has a process that decodes (dataset/video.py). One client gets all but
        # one, by its address: whatever it sends, another one's clip is decoded at once.
        self.decoders = ThreadPoolExecutor(flags.decoders, "decoder")
        self.turns: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()
        # Text above this is too long however it is cut into tokens, and needn't be.
        longest = max(map(len, chat_model.tokenizer.get_vocab()))
        self.max_characters = longest * flags.max_prompt_tokens

    def check_model(self, name: str) -> None:
        if name != self.flags.model_name:
            raise APIError(404, f"the model {name[:100]!r} isn't here", "model_not_found", "model")

    async def admit(self) -> AsyncIterator[None]:
        """Admission control: as many requests at a time, from here to the end of their answers."""
        if self.in_flight >= self.flags.max_queue:
            raise overloaded("the server is full; try again")
        self.in_flight += 1
        self.metrics.in_flight.set(self.in_flight)
        try:
            yield
        finally:
            self.in_flight -= 1
            self.metrics.in_flight.set(self.in_flight)

    async def answer(self, request: Request) -> Response:
        async with self._body(request) as body:
            chat = await asyncio.to_thread(ChatRequest.parse, body)
            del body
            async with _unless_gone(request):
                sequence = await self._sequence(chat, request.client.host)
        streams, options = bool(chat.stream), chat.stream_options
        del chat
        warnings = [text for visual in sequence.request.visuals for text in visual.warnings]
        reply = Reply(self.flags.model_name, warnings)
        texts = self._texts(sequence)
        async with _unless_gone(request):
            first = await anext(texts)  # a failure before it still has a status of its own
            if not streams:
                text = first + "".join([text async for text in texts])
                return JSONResponse(reply.whole(text, sequence.finish_reason, usage_of(sequence)))
        with_usage = bool(options and options.include_usage)
        return _EventStream(self._events(sequence, first, texts, reply, with_usage))

    # ---- from a request's body to a sequence

    @asynccontextmanager
    async def _body(self, request: Request) -> AsyncIterator[bytes]:
        """The body counts for as long as it, or what is in it, is held."""
        chunks, size, marks = [], 0, 0
        too_large = APIError(
            413, f"the request is above {self.flags.max_body_mb:g} MiB", "body_too_large"
        )
        announced = request.headers.get("content-length", "0")
        if announced.isdecimal() and int(announced) > self.max_body:
            raise too_large  # before the first byte
        try:
            async with asyncio.timeout(self.flags.upload_timeout):
                async for chunk in request.stream():
                    size, self.body_bytes = size + len(chunk), self.body_bytes + len(chunk)
                    marks += sum(map(chunk.count, JSON_MARKS))
                    if size > self.max_body:
                        raise too_large
                    if marks > MAX_JSON_MARKS:
                        raise APIError(413, "the request has too many values", "body_too_large")
                    if self.body_bytes > BODIES_AT_ONCE * self.max_body:
                        raise overloaded("too much is being uploaded; try again")
                    chunks.append(chunk)
            request.state.body_is_read = True
            body = b"".join(chunks)
            del chunks
            yield body
        except TimeoutError:
            limit = self.flags.upload_timeout
            raise APIError(408, f"the request didn't arrive within {limit:g} s") from None
        finally:
            self.body_bytes -= size

    async def _sequence(self, chat: ChatRequest, client: str) -> Sequence:
        """Raises APIError for whatever is wrong with the request: the model's thread sees none."""
        self.check_model(chat.model)
        messages, urls = as_conversation(chat.messages)
        if len(urls) > self.flags.max_visuals:
            found = f"{len(urls)} visuals are above the {self.flags.max_visuals} of a request"
            raise APIError(400, found, "too_many_visuals", "messages")
        if sum(len(turn["content"]) for turn in messages) > self.max_characters:
            raise self._too_many_tokens("more than")
        visuals, seconds = [], self.flags.media_timeout
        for number, url in enumerate(urls, 1):
            try:
                visual, taken = await self._visual(f"visual {number}", url, client, seconds)
            except APIError as error:
                error.message = f"visual {number} of {len(urls)}: {error.message}"
                error.param = "messages"
                self.metrics.media.labels(error.code or "refused").inc()
                raise
            visuals, seconds = [*visuals, visual], max(0.01, seconds - taken)
            self.metrics.media.labels("read").inc()
        given = (chat.max_completion_tokens, chat.max_tokens, self.flags.default_new_tokens)
        longest = next(number for number in given if number is not None)
        temperature = self.flags.temperature if chat.temperature is None else chat.temperature
        sampling = Sampling(
            max_new_tokens=min(longest, self.flags.max_new_tokens),
            # Numbers so small that nothing would be left to sample from mean the most probable.
            temperature=temperature if temperature > 1e-3 else 0.0,
            top_p=1.0 if chat.top_p is None else max(chat.top_p, 1e-6),
            seed=None if chat.seed is None else chat.seed % 2**63,
        )
        stop = tuple(stop for stop in chat.stop or () if stop)
        try:
            request = self.chat_model.make_request(messages, visuals, sampling, stop)
        except ConversationError as error:
            raise APIError(400, str(error), None, "messages") from None
        if (tokens := len(request.columns)) > self.flags.max_prompt_tokens:
            raise self._too_many_tokens(f"{tokens} tokens are above")
        return Sequence(request)

    def _too_many_tokens(self, found: str) -> APIError:
        limit = f"{found} the {self.flags.max_prompt_tokens} tokens that a prompt may have"
        return APIError(400, limit, "context_length_exceeded", "messages")

    async def _visual(
        self, name: str, url: str, client: str, seconds: float
    ) -> tuple[Visual, float]:
        """Also the seconds that decoding took."""
        file = await self.source.open(url)
        turn = self.turns.setdefault(client, asyncio.Semaphore(max(1, self.flags.decoders - 1)))
        try:
            await turn.acquire()
        except BaseException:
            file.close()
            raise
        loop = asyncio.get_running_loop()
        decoding = loop.run_in_executor(self.decoders, self._decode, file, seconds)
        # A client that hangs up keeps its turn until its file is done with.
        decoding.add_done_callback(lambda _: turn.release())
        clip, taken = await asyncio.shield(decoding)
        encoding = self.scheduler.run(self.chat_model.encode_clip, name, clip)
        return await asyncio.wrap_future(encoding), taken

    def _decode(self, file: BinaryIO, seconds: float) -> tuple[Frames, float]:
        """Frames of the tower's size; raises APIError with the reason."""
        limits = self.flags.media_limits(self.chat_model.num_frames, seconds)
        # Closed here, not by a reader who may have left: its number must not become another's file
        # while it is being decoded.
        with file:
            started = time.monotonic()
            try:
                clip = self.chat_model.decode_frames(path_of(file), resize=True, **limits)
            except VideoError as error:
                detail = error.detail.replace(error.path, "the file")  # its path means nothing
                found = f"{error.reason}: {detail}"
                raise APIError(400, found, f"media_{error.reason}") from None
            return clip, time.monotonic() - started

    # ---- from a sequence to an answer

    async def _texts(self, sequence: Sequence) -> AsyncGenerator[str, None]:
        """Its text in pieces; the first one may be empty. Whatever closes the iterator, a hang-up
        or a deadline, ends the sequence. Raises APIError if the model failed."""
        loop, texts = asyncio.get_running_loop(), asyncio.Queue()

        def receive(text: str) -> None:
            loop.call_soon_threadsafe(texts.put_nowait, text)

        try:
            self.scheduler.submit(sequence, receive)
            yield (text := await texts.get())
            while text:
                if text := await texts.get():
                    yield text
        finally:
            if sequence.finish_reason is None:
                self.metrics.left.inc()
                self.scheduler.cancel(sequence)
        if sequence.finish_reason == "error":
            raise APIError(500, "the model failed", "internal_error")

    async def _events(
        self,
        sequence: Sequence,
        first: str,
        texts: AsyncGenerator[str, None],
        reply: Reply,
        with_usage: bool,
    ) -> AsyncIterator[str]:
        usage = {"usage": None} if with_usage else {}  # in every chunk, as OpenAI has it
        async with aclosing(texts):
            yield _sse(reply.chunk({"role": "assistant", "content": ""}, **usage))
            try:
                yield _sse(reply.chunk({"content": first}, **usage))
                async for text in texts:
                    yield _sse(reply.chunk({"content": text}, **usage))
                yield _sse(reply.chunk({}, sequence.finish_reason, **usage))
                if with_usage:
                    yield _sse(reply.chunk(None, usage=usage_of(sequence)))
            except APIError as error:
                yield _sse(error.body())
            yield "data: [DONE]\n\n"


class _EventStream(StreamingResponse):
    """Closes its events, whatever ended it."""

    def __init__(self, events: AsyncIterator[str]):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self.body_iterator):
            await super().__call__(scope, receive, send)


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


async def _drain(request: Request, most: int) -> None:
    """Reads what is left of a refused body. Most clients send all of it before they look at the
    answer, and closing the connection in the midst of that would take the answer from them."""
    if getattr(request.state, "body_is_read", False) or "expect" in request.headers:
        return
    with suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_SECONDS):
            while (message := await request.receive())["type"] == "http.request":
                most -= len(message["body"])
                if most < 0 or not message["more_body"]:
                    return


def overloaded(message: str) -> APIError:
    return APIError(503, message, "server_busy", headers={"Retry-After": "1"})


def _sse(chunk: dict) -> str:
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
