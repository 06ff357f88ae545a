"""The server as its users meet it: a process of its own, OpenAI's client, real clips, and clients
that hang up or come all at once. Those who mean harm are in test_attacks.py."""

import asyncio
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import openai
import pytest
from PIL import Image

from inference.chat_model import ChatModel
from inference.request import Sequence
from inference.scheduler import Scheduler
from inference.server.limits import Deadline
from inference.server.metrics import Metrics
from model.generate import Sampling
from tests.clips import damage_packet, make_clip
from tests.inference.service import Server, about, conversation, data_url, get, post, until

LONG = {"max_tokens": 3000, "seed": 1, "temperature": 2.0}  # continues until somebody ends it


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    for number in range(8):
        make_clip(folder / f"{number}.mp4", 30 * number)
    Image.new("RGB", (64, 64), "red").save(folder / "picture.png")
    return folder


@pytest.fixture(scope="module")
def server(tiny_checkpoint, tiny_tower, tmp_path_factory):
    server = Server(
        *(tiny_checkpoint, tiny_tower, tmp_path_factory.mktemp("server")),
        *("--max_new_tokens", 3000, "--max_queue", 16, "--dtype", "float32", "--max_body_mb", 2),
        *("--max_prompt_tokens", 300),
    )
    yield server
    server.stop()


def alone(chat_model: ChatModel, text: str, *clips: Path) -> str:
    """The answer to one question with nobody else there. An untrained model gives nonsense, but
    other nonsense about each clip, which is all that these tests need."""
    visuals = [chat_model.encode_video(clip) for clip in clips]
    turns = [{"role": "user", "content": "<video>\n" * len(clips) + text}]
    return chat_model.generate([chat_model.make_request(turns, visuals, Sampling(8))])[0]


# ---- what clients rely on


def test_openais_client_gets_the_answer_about_a_video(server, chat_model, folder):
    clip = folder / "3.mp4"
    reply = server.ask(about(data_url(clip)))
    assert reply.choices[0].message.content.strip() == alone(chat_model, "What happens?", clip)
    assert reply.choices[0].finish_reason == "length" and reply.object == "chat.completion"
    assert reply.usage.completion_tokens == 8
    assert reply.usage.prompt_tokens > 50  # a video is 50 of them
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + 8


def test_streaming_gives_the_same_answer_in_pieces(server, folder):
    content = about(data_url(folder / "3.mp4"))
    whole = server.ask(content)
    chunks = list(server.ask(content, stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content for chunk in chunks[:-1]]
    assert "".join(piece or "" for piece in pieces) == whole.choices[0].message.content
    assert len(pieces) > 4
    assert chunks[0].choices[0].delta.role == "assistant"
    reasons = [chunk.choices[0].finish_reason for chunk in chunks[:-1]]
    assert reasons == [None] * (len(pieces) - 1) + ["length"]
    assert chunks[-1].usage == whole.usage and chunks[-1].choices == []
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_text_an_image_two_videos_and_a_chat(server, chat_model, folder):
    png = {"type": "image_url", "image_url": {"url": data_url(folder / "picture.png")}}
    answer = server.ask([{"type": "text", "text": "What is it?"}, png]).choices[0].message.content
    # A visual after the text is moved before it, where training has it.
    assert answer.strip() == alone(chat_model, "What is it?", folder / "picture.png")
    clips = [folder / "1.mp4", folder / "2.mp4"]
    answer = server.ask(about(*map(data_url, clips))).choices[0].message.content
    assert answer.strip() == alone(chat_model, "What happens?", *clips)
    turns = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": about(data_url(clips[0]))},
        {"role": "assistant", "content": "A thing moves."},
        {"role": "user", "content": "Where to? Is that HTML's <video>?"},  # a tag is only text
    ]
    assert server.ask(None, messages=turns).usage.prompt_tokens > 50
    assert server.ask("你好").usage.prompt_tokens < 50


def test_settings_have_an_effect(server):
    greedy = server.ask("Tell me.", max_tokens=12).choices[0]
    hot = [server.ask("Tell me.", temperature=2, seed=seed, max_tokens=12) for seed in (1, 1, 2)]
    answer = [reply.choices[0].message.content for reply in hot]
    assert answer[0] == answer[1] != answer[2] and greedy.message.content not in answer
    for settings in ({"temperature": 2, "top_p": 1e-6}, {"temperature": 1e-40}, {"top_p": 1e-300}):
        settings = {"temperature": 1, "seed": 1} | settings
        cold = server.ask("Tell me.", max_tokens=12, **settings).choices[0]
        assert cold.message.content == greedy.message.content
    stop = greedy.message.content[4:6]
    cut = server.ask("Tell me.", stop=[stop], max_completion_tokens=12).choices[0]
    assert cut.finish_reason == "stop"
    assert cut.message.content == greedy.message.content.partition(stop)[0]
    # What only informs a provider is ignored, as elsewhere.
    extra = {"user": "me", "store": False, "metadata": {"a": "b"}, "n": 1, "presence_penalty": 0}
    assert server.ask("Tell me.", max_tokens=12, **extra).choices[0] == greedy


def test_many_users_at_once_each_get_their_own_answer(server, chat_model, folder):
    """Batched with others, joining and leaving at any token, each is answered as if alone."""
    asked = [(f"What is {n}?", [folder / f"{n % 8}.mp4"] * (n % 3 > 0)) for n in range(48)]
    truth = [alone(chat_model, text, *clips) for text, clips in asked]
    assert len(set(truth)) > 24

    def ask(question) -> str:
        text, clips = question
        reply = server.ask(about(*map(data_url, clips), text=text))
        return reply.choices[0].message.content.strip()

    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(ask, asked)) == truth
    assert server.metric("cinego_batch_size_sum") > server.metric("cinego_batch_size_count")


def test_models_health_and_metrics(server):
    assert [model.id for model in server.client.models.list()] == ["cinego"]
    assert server.client.models.retrieve("cinego").owned_by == "cinego"
    with pytest.raises(openai.NotFoundError):
        server.client.models.retrieve("gpt-4")
    before = server.metric('cinego_tokens_total{kind="completion"}')
    server.ask("Hello", max_tokens=5)
    assert server.metric('cinego_tokens_total{kind="completion"}') == before + 5
    assert '{"status":"ok"}' in server.raw(get("/health"))


# ---- what is refused


@pytest.mark.parametrize(
    ("settings", "status", "param", "code"),
    [
        ({"model": "gpt-4"}, 404, "model", "model_not_found"),
        ({"n": 2}, 400, "n", "unsupported_parameter"),
        ({"logprobs": True}, 400, "logprobs", "unsupported_parameter"),
        ({"tools": [{"type": "function"}]}, 400, "tools", "unsupported_parameter"),
        ({"temperature": 3}, 400, "temperature", None),
        ({"top_p": 0}, 400, "top_p", None),
        ({"max_tokens": 0}, 400, "max_tokens", None),
        ({"stop": ["x"] * 99}, 400, "stop", None),
        ({"messages": []}, 400, "messages", None),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages.0.role", None),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "messages", None),
        ({"content": [{"type": "audio"}]}, 400, "messages.0.content.0", None),
        ({"content": "word " * 400}, 400, "messages", "context_length_exceeded"),
        ({"content": "x" * 1_000_000}, 400, "messages", "context_length_exceeded"),
        ({"content": "x" * 3_000_000}, 413, None, "body_too_large"),
        ({"content": about("data:video/mp4;base64,AAAA")}, 400, "messages", "media_unreadable"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_wrong_requests_are_named_in_openais_form(server, settings, status, param, code):
    with pytest.raises(openai.APIStatusError) as caught:
        server.ask(settings.pop("content", "hello"), **settings)
    error = caught.value
    assert (error.status_code, error.body["param"], error.body["code"]) == (status, param, code)
    assert error.body["message"] and error.body["type"]


def test_damaged_frames_are_taken_and_told(server, folder, tmp_path):
    path = make_clip(tmp_path / "clip.mp4", 60, frames=24)
    damage_packet(path, lambda packets: packets[12])
    for streams in (False, True):
        reply = server.ask(about(data_url(folder / "0.mp4"), data_url(path)), stream=streams)
        (warning,) = (list(reply)[0] if streams else reply).model_extra["warnings"]
        assert "visual 2 is damaged near 1." in warning


# ---- who leaves, who comes when it's full, and the end


def test_who_hangs_up_is_no_longer_worked_for(server):
    left = server.metric("cinego_clients_left_total")
    written = server.metric('cinego_tokens_total{kind="completion"}')
    stream = server.ask("Go on.", stream=True, **LONG)
    next(iter(stream))
    until(lambda: server.metric("cinego_batch_rows") == 1)
    stream.close()
    until(lambda: server.metric("cinego_batch_rows") == 0)
    # One who waits for the whole answer, too.
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(post(conversation("Go on.", **LONG)))
        until(lambda: server.metric("cinego_batch_rows") == 1)
    until(lambda: server.metric("cinego_batch_rows") == 0)
    assert server.metric("cinego_clients_left_total") == left + 2
    assert server.metric("cinego_in_flight") == 0
    assert server.metric('cinego_tokens_total{kind="completion"}') == written  # none was finished


def test_one_client_leaves_room_for_others(server):
    """It gets seven eighths of --max_queue; above, it gets 503."""
    with ExitStack() as streams:
        for _ in range(14):
            streams.enter_context(server.ask("Go on.", stream=True, **LONG))
        waits = "Expect: 100-continue"  # refused before its body is here
        full = server.raw(post(b"", waits, length=1000))
        assert " 503 " in full[:20] and "retry-after: 1" in full.lower() and "server_busy" in full
        assert server.metric("cinego_in_flight") == 14
        other = post(conversation("Go on.", max_tokens=1))
        assert " 200 " in server.raw(other, address="127.0.0.2")[:20]


def test_a_client_that_leaves_before_the_model_starts_costs_nothing(chat_model):
    turns = [{"role": "user", "content": "What is it?"}]
    sequences = [Sequence(chat_model.make_request(turns, (), Sampling(8))) for _ in range(4)]
    ends, texts, submitted = [], [], threading.Event()
    scheduler = Scheduler(chat_model, max_batch=2)
    scheduler.run(submitted.wait)
    scheduler.run(len, texts).cancel()  # one whose video was still to be encoded

    def receive(text):  # whoever waits for another thread, which asks too
        other = threading.Thread(target=scheduler.run, args=(ends.append, text), daemon=True)
        other.start()
        other.join(timeout=10)
        assert not other.is_alive()

    for sequence in sequences[:3]:
        scheduler.submit(sequence, receive)
        scheduler.cancel(sequence)
    scheduler.submit(sequences[3], texts.append)
    submitted.set()
    until(lambda: len(ends) == 3)
    scheduler.stop()
    assert "".join(texts).strip() == alone(chat_model, "What is it?")
    assert [each.finish_reason for each in sequences] == [*["cancelled"] * 3, "length"]
    assert ends == ["", "", ""] and [each.completion_tokens for each in sequences] == [0, 0, 0, 8]
    assert not scheduler.is_healthy
    with pytest.raises(RuntimeError, match="thread has ended"):
        scheduler.submit(sequences[0], ends.append)


@pytest.mark.parametrize("device_dies", [False, True])
def test_a_step_that_fails_ends_its_batch_and_a_dead_device_the_health(chat_model, device_dies):
    turns = [{"role": "user", "content": "What is it?"}]
    first, second = (Sequence(chat_model.make_request(turns, (), Sampling(8))) for _ in range(2))
    scheduler = Scheduler(chat_model)
    if device_dies:
        scheduler.device = "meta"  # no number can be read from it
    block = chat_model.model.language_model.model.layers[1]

    def fail(module, args):
        raise RuntimeError("out of memory")

    handle = block.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="the model failed"):
        "".join(scheduler.stream(first))
    handle.remove()
    assert first.finish_reason == "error"
    if device_dies:
        until(lambda: not scheduler.is_healthy)
    else:
        assert "".join(scheduler.stream(second)).strip() == alone(chat_model, "What is it?")
        assert scheduler.is_healthy
        scheduler.stop()


def test_a_request_that_takes_too_long_is_ended():
    """Answered with 504; a stream that has begun is cut."""

    async def hangs(scope, receive, send):
        if scope["streams"]:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        await asyncio.sleep(60)

    for streams, wanted in ((False, 504), (True, 200)):
        sent = []

        async def send(message, sent=sent):
            sent.append(message)

        scope = {"type": "http", "path": "/v1/chat/completions", "streams": streams}
        asyncio.run(Deadline(hangs, 0.05, Metrics())(scope, None, send))
        assert sent[0]["status"] == wanted
        assert (b'"timeout"' in sent[-1].get("body", b"")) == (not streams)
