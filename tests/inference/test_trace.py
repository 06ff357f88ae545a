"""One question takes one way to the model: from the terminal, the page and the API."""

import sys
import threading
from collections import Counter
from contextlib import contextmanager

from starlette.testclient import TestClient

from inference.flags import ServerFlags
from inference.page.conversation import Conversation, SharedModel
from inference.server.app import build_app
from inference.terminal import Terminal
from model.generate import Sampling
from tests.clips import make_clip
from tests.inference.service import about, conversation, data_url

WAY = [  # each once: so a clip is decoded and a prompt is tokenised once
    "dataset.video.read_frames",
    "inference.chat_model.ChatModel.encode_clip",
    "inference.chat_model.ChatModel.encode_frames",
    "dataset.conversation.encode",
    "inference.chat_model.ChatModel.make_request",
    "inference.request.Sequence.__init__",
    "inference.engine.Engine.add",
    "model.generate.DecodingBatch.prefill",
]
QUESTION, TOKENS = "What happens?", 8


@contextmanager
def traced():
    """The functions of WAY that are called inside, in this thread and those that it starts."""
    calls, starts = [], {name.rpartition(".")[2] for name in WAY}

    def note(frame, event, argument):
        if event == "call" and frame.f_code.co_name in starts:
            name = f"{frame.f_globals.get('__name__')}.{frame.f_code.co_qualname}"
            if name in WAY:
                calls.append(name)

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        yield calls
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def in_terminal(chat_model, clip) -> str:
    terminal = Terminal(chat_model, Sampling(TOKENS))
    terminal.attach(clip)
    terminal.answer(QUESTION)
    return terminal.chat.transcript[-1]["content"]


def on_page(chat_model, clip) -> str:
    model = SharedModel(chat_model)
    conversation = Conversation(model)
    conversation.attach(clip, clip.name, chat_model.num_frames)
    text = "".join(conversation.ask(QUESTION, Sampling(TOKENS)))
    model.scheduler.stop()
    return text.strip()


def through_api(chat_model, clip, monkeypatch) -> str:
    monkeypatch.setattr(ServerFlags, "load_model", lambda flags: chat_model)
    body = conversation(about(data_url(clip), text=QUESTION), max_tokens=TOKENS)
    with TestClient(build_app(ServerFlags()), base_url="http://localhost") as client:
        reply = client.post("/v1/chat/completions", json=body).json()
    return reply["choices"][0]["message"]["content"].strip()


def test_terminal_page_and_api_pass_the_same_functions_each_once(chat_model, tmp_path, monkeypatch):
    clip = make_clip(tmp_path / "clip.mp4", 60)
    answers = []
    for ask, more in ((in_terminal, ()), (on_page, ()), (through_api, (monkeypatch,))):
        with traced() as calls:
            answers.append(ask(chat_model, clip, *more))
        assert Counter(calls) == Counter(WAY), ask.__name__
    assert len(set(answers)) == 1 and answers[0]
