"""From the body of a request to its answer.

`ChatRequest.parse` → its visuals, decoded and encoded → `ChatModel.make_request` → a `Sequence` for
the scheduler → JSON or server-sent events.
"""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, aclosing
from typing import BinaryIO
from weakref import WeakValueDictionary

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.requests import ClientDisconnect

from dataset.conversation import ConversationError
from dataset.video import Frames, VideoError
from inference.chat_model import ChatModel
from inference.flags import ServerFlags
from inference.request import Sequence, Visual
from inference.scheduler import Scheduler
from inference.server.limits import Share, body_size, read_body
from inference.server.media import MediaSource, path_of
from inference.server.metrics import Metrics
from inference.server.schema import APIError, ChatRequest, Reply, TextPart, as_conversation
from model.generate import Sampling

BODIES_AT_ONCE = 8  # full-sized ones that may be in memory together


class Service:
    def __init__(self, chat_model: ChatModel, flags: ServerFlags, metrics: Metrics):
        self.chat_model, self.flags, self.metrics = chat_model, flags, metrics
        self.scheduler = Scheduler(
            chat_model, flags.max_batch, flags.batch_wait_ms / 1e3, metrics.count_step
        )
        memory = BODIES_AT_ONCE * flags.max_body
        self.memory = Share(memory, "too much is being uploaded; try again")
        self.slots = Share(flags.max_queue, "the server is full; try again")
        metrics.batch_rows.set_function(lambda: len(self.scheduler.engine.sequences))
        metrics.in_flight.set_function(self.slots.taken.total)
        self.source = MediaSource(flags)
        # JSON and text are taken apart in one thread: several would keep the server's own from
        # running for as many times as long.
        self.parser = ThreadPoolExecutor(1, "parser")
        # Each of its threads has a process that decodes (dataset/video.py). One client gets all but
        # one, by its address: whatever it sends, another one's clip is decoded at once.
        self.decoders = ThreadPoolExecutor(flags.decoders, "decoder")
        self.turns: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()
        # Text above this is too long however it is cut into tokens, and needn't be.
        longest = max(map(len, chat_model.tokenizer.get_vocab()))
        self.max_characters = longest * flags.max_prompt_tokens

    async def stop(self) -> None:
        await asyncio.to_thread(self.scheduler.stop)
        await self.source.http.aclose()
        for pool in (self.parser, self.decoders):
            pool.shutdown(cancel_futures=True)

    def check_model(self, name: str) -> None:
        if name != self.flags.model_name:
            raise APIError(404, f"the model {name[:100]!r} isn't here", "model_not_found", "model")

    async def answer(self, request: Request, held: AsyncExitStack) -> Response:
        """held: what is given back once the answer has been sent. Raises ClientDisconnect."""
        client = request.client.host
        self.slots.check(client)  # before its body
        with self.memory.held(client, body_size(request, self.flags)):
            body = await read_body(request, self.flags)
            # Whoever sends slowly has no slot: admission control begins here.
            held.enter_context(self.slots.held(client))
            chat, messages, urls = await self._in_parser(self._parse, body)
            del body
            visuals = await self._visuals(urls, request)
            sequence = await self._in_parser(self._sequence, chat, messages, visuals)
        warnings = [text for each in visuals for text in each.warnings]
        reply, texts = Reply(self.flags.model_name, sequence, warnings), self._texts(sequence)
        await held.enter_async_context(aclosing(texts))  # whatever ends the response
        text = await anext(texts)  # a failure before it still has a status of its own
        if chat.stream:
            with_usage = chat.stream_options is not None and chat.stream_options.include_usage
            events = _events(text, texts, reply, with_usage)
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            return StreamingResponse(events, headers=headers, media_type="text/event-stream")
        async for more in texts:
            text += more
            await _check_connected(request)
        return JSONResponse(reply.whole(text))

    # ---- from a body to a sequence. Raise APIError for whatever is wrong: the model's thread sees
    # no request that it can't answer.

    async def _in_parser(self, function, *arguments):
        return await asyncio.get_running_loop().run_in_executor(self.parser, function, *arguments)

    def _parse(self, body: bytearray) -> tuple[ChatRequest, list[dict], list[str]]:
        """The request without its messages, the messages, and the URLs of their visuals."""
        chat = ChatRequest.parse(body)
        self.check_model(chat.model)
        parts = (part for message in chat.messages for part in message.content)
        characters = sum(len(part.text) for part in parts if isinstance(part, TextPart))
        if characters > self.max_characters:
            raise self._too_many_tokens("more than")
        messages, urls = as_conversation(chat.messages)
        if len(urls) > self.flags.max_visuals:
            found = f"{len(urls)} visuals are above the {self.flags.max_visuals} of a request"
            raise APIError(400, found, "too_many_visuals", "messages")
        chat.messages = []
        return chat, messages, urls

    def _sequence(self, chat: ChatRequest, messages: list[dict], visuals: list[Visual]) -> Sequence:
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

    async def _visuals(self, urls: list[str], request: Request) -> list[Visual]:
        """One after the other, decoded in `media_timeout` seconds in all."""
        visuals, seconds, loop = [], self.flags.media_timeout, asyncio.get_running_loop()
        most = asyncio.Semaphore(max(1, self.flags.decoders - 1))
        turn = self.turns.setdefault(request.client.host, most)
        for number, url in enumerate(urls, 1):
            try:
                file = await self.source.open(url)
                async with turn:
                    await _check_connected(request)
                    decoding = loop.run_in_executor(self.decoders, self._decode, file, seconds)
                    clip, taken = await decoding
            except APIError as error:
                error.message = f"visual {number} of {len(urls)}: {error.message}"
                error.param = "messages"
                self.metrics.media.labels(error.code or "refused").inc()
                raise
            seconds = max(0.01, seconds - taken)
            encoding = self.scheduler.run(self.chat_model.encode_clip, f"visual {number}", clip)
            visuals.append(await asyncio.wrap_future(encoding))
            self.metrics.media.labels("read").inc()
        return visuals

    def _decode(self, file: BinaryIO, seconds: float) -> tuple[Frames, float]:
        """Frames of the tower's size, and the seconds that they took."""
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


async def _check_connected(request: Request) -> None:
    if await request.is_disconnected():
        raise ClientDisconnect


async def _events(
    first: str, texts: AsyncIterator[str], reply: Reply, with_usage: bool
) -> AsyncIterator[str]:
    usage = {"usage": None} if with_usage else {}  # in every chunk, as OpenAI has it
    yield _sse(reply.chunk({"role": "assistant", "content": ""}, **usage))
    try:
        yield _sse(reply.chunk({"content": first}, **usage))
        async for text in texts:
            yield _sse(reply.chunk({"content": text}, **usage))
        yield _sse(reply.chunk({}, reply.sequence.finish_reason, **usage))
        if with_usage:
            yield _sse(reply.chunk(None, usage=reply.usage()))
    except APIError as error:
        yield _sse(error.body())
    yield "data: [DONE]\n\n"


def _sse(chunk: dict) -> str:
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
