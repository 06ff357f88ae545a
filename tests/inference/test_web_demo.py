"""The page: its logic by streamlit's own AppTest, then a real process with real browsers."""

import json
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from string import Formatter
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from PIL import Image
from selenium.webdriver.common.by import By
from streamlit.testing.v1 import AppTest

import web_demo
from inference.chat import Chat
from inference.flags import PageFlags
from inference.page.conversation import Conversation
from inference.page.view import TEXTS, language_of
from inference.page.visual import escaped
from inference.parts import TOKENIZER_PATH, find_models
from model.checkpoint import load_video_language_model, save_model
from model.generate import GREEDY, Sampling
from model.tokenizer import OURS
from scripts.export_hf import main as convert
from tests.clips import make_clip
from tests.inference.browser import MISSING, WATCH, Browser, Page
from tests.inference.service import ROOT, connect

QUESTION = "What happens in this video?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Files that users bring. `examples/` has two clips, `out/` no model."""
    folder = tmp_path_factory.mktemp("files")
    for name, shade in (("a", 20), ("b", 90)):
        make_clip(folder / f"{name}.mp4", shade, rate=4)
    (folder / "examples").mkdir()
    for name, shade in (("one", 200), ("two", 150)):
        make_clip(folder / f"examples/{name}.mp4", shade)
    (folder / "out").mkdir()
    Image.new("RGB", (96, 64), "red").save(folder / "picture.png")
    (folder / "broken.mp4").write_bytes((folder / "a.mp4").read_bytes()[:900])
    script = b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"
    for name in ("html.mp4", "svg.png"):
        (folder / name).write_bytes(script)
    (folder / "large.mp4").write_bytes(bytes((1 << 20) + 1))
    make_clip(folder / "long.mp4", 0, (16, 16), frames=40, rate=1)
    make_clip(folder / "wide.mp4", 0, (16, 2048), frames=2)
    return folder


@pytest.fixture(scope="module")
def model_flags(tiny_checkpoint, tiny_tower) -> tuple:
    parts = "--load_from", tiny_checkpoint, "--vision_path", tiny_tower
    return *parts, "--device", "cpu", "--dtype", "float32"


@pytest.fixture
def open_page(monkeypatch, model_flags, folder):
    """Opens the page with these flags, for one user."""

    def open_page(*flags, model: bool = True) -> AppTest:
        own = (*(model_flags if model else ()), "--out_dir", folder / "out")
        flags = (*own, "--examples", folder / "examples", *flags)
        monkeypatch.setattr(sys, "argv", ["web_demo.py", *map(str, flags)])
        page = AppTest.from_file(str(ROOT / "web_demo.py"), default_timeout=60).run()
        assert not page.exception
        return page

    return open_page


def say(page: AppTest, text: str | None, *files: Path) -> AppTest:
    for file in files:
        page.chat_input[0].upload(file.name, file.read_bytes())
    if text is not None:
        page.chat_input[0].set_value(text)
    page.run()
    assert not page.exception
    return page


def texts_of(page: AppTest) -> list[str]:
    """Questions and answers in turn."""
    return [text.value for text in page.text]


def chat_with(chat_model, *asked: tuple, sampling: Sampling = GREEDY, **frames) -> list[str]:
    """Questions, each with its files, and the answers in turn, as a page shows them."""
    chat, found = Chat(chat_model), []
    for question, *files in asked:
        for file in files:
            chat.attach(chat_model.encode_video(file, **frames))
        found += [question, "".join(chat.ask(question, sampling)).strip()]
    return found


def strips(page: AppTest) -> list[list[tuple[float, int]]]:
    """(seconds, percent) of the frames of each strip."""
    found = [element.value for element in page.get("html") if "<time>" in element.value]
    cell = re.compile(r"<b>(\d+) %</b></div><time>([\d.]+) s</time>")
    return [[(float(s), int(p)) for p, s in cell.findall(body)] for body in found]


def conversation_of(page: AppTest) -> Conversation:
    return page.session_state["conversation"]


# ---- a conversation


def test_without_a_model_of_ones_own_the_one_that_ships_answers(open_page, folder):
    page = open_page(model=False)
    assert page.selectbox[0].options == ["demo/model/sft_videolm_128.pth"]
    say(page, "What do you see?", folder / "picture.png")
    assert len(texts_of(page)) == 2
    assert "nothing like those that this model was trained on" in page.warning[0].value


def test_several_files_and_many_turns_are_answered_as_by_the_chat(open_page, chat_model, folder):
    page = open_page()
    assert not page.get("download_button")
    asked = (
        (QUESTION, folder / "a.mp4", folder / "picture.png"),
        ("And now?",),
        ("Which is first?", folder / "b.mp4"),
    )
    for question in asked:
        say(page, *question)
    expected = chat_with(chat_model, *asked)
    assert texts_of(page) == expected and len(set(expected[1::2])) == 3
    # The frames and times that the model has, and the weights that docs/talking.md defines.
    for strip, name in zip(strips(page), ("a.mp4", "b.mp4"), strict=True):
        visual = chat_model.encode_video(folder / name)
        weights = chat_model.frame_weights(visual)
        assert [second for second, _ in strip] == [round(t, 1) for t in visual.timestamps]
        assert [percent for _, percent in strip] == [round(100 * weight) for weight in weights]
    assert "4 of 8 frames" in page.markdown[0].value
    # What can be saved.
    assert [button.label for button in page.get("download_button")] == ["Markdown", "JSON"]
    saved = conversation_of(page).chat.format_transcript
    asked, answered, *_ = json.loads(saved(".json"))
    assert asked["visuals"] == ["a.mp4", "picture.png"] and QUESTION in asked["content"]
    assert f"**A:** {answered['content']}" in saved(".md")


def test_an_example_and_a_suggestion_need_no_typing(open_page, chat_model, folder):
    page = open_page()
    page.button(key="example 1").click().run()
    page.button(key="suggestion 0").click().run()
    assert texts_of(page) == chat_with(chat_model, (QUESTION, folder / "examples/two.mp4"))
    assert (folder / "examples/two.mp4").is_file()
    # The greeting is gone; what waited is shown once.
    assert [button.label for button in page.button] == ["New conversation"]
    page.sidebar.button[0].click().run()
    assert (folder / "examples/two.mp4").is_file()  # only what was uploaded is deleted
    assert not page.text and page.title[0].value == "Cinego"


def test_settings_are_those_of_the_answer(open_page, chat_model, folder):
    page = open_page()
    sliders = {"temperature": 1.0, "top_k": 50, "top_p": 0.8, "repetition_penalty": 1.2}
    for key, value in sliders.items():
        page.slider(key=key).set_value(value)
    page.number_input(key="max_new_tokens").set_value(9)
    page.number_input(key="seed").set_value(7)
    next(s for s in page.slider if s.key.startswith("num_frames")).set_value(6)
    say(page, QUESTION, folder / "a.mp4")
    sampling = Sampling(9, 1.0, top_k=50, top_p=0.8, repetition_penalty=1.2, seed=7)
    asked = (QUESTION, folder / "a.mp4")
    assert texts_of(page) == chat_with(chat_model, asked, sampling=sampling, num_frames=6)
    assert len(strips(page)[0]) == 6
    assert "9 tokens" in page.caption[1].value and "cut at the longest" in page.caption[1].value


def test_everything_is_said_in_chinese_too(open_page, folder):
    for key, text in TEXTS["en"].items():
        for one, other in zip(
            *((t if isinstance(t, list) else [t]) for t in (text, TEXTS["zh"][key])), strict=True
        ):
            fields = [{field for _, field, _, _ in Formatter().parse(t)} for t in (one, other)]
            assert fields[0] == fields[1], key
            assert key in ("top_p", "top_k", "thinking", "facts") or one != other, key
    assert TEXTS["en"].keys() == TEXTS["zh"].keys()
    assert [language_of(name) for name in ("zh-CN", "de-DE", None)] == ["zh", "en", "en"]
    page = say(open_page(), QUESTION, folder / "a.mp4")
    page.session_state["language"] = "zh"
    page.run()
    assert page.sidebar.button[0].label == "新对话" and "8 帧中的 4 帧" in page.markdown[0].value
    assert texts_of(page)[0] == QUESTION  # what was said stays as it was said


# ---- files that can't be used


@pytest.mark.parametrize(
    "flags, name, reasons",
    [
        ([], "broken.mp4", [r"**broken\.mp4** can't be used", "ffmpeg -i in.mp4 out.mp4"]),
        # By .html and .svg streamlit takes no file; by another suffix it is no video.
        ([], "html.mp4", ["can't be used"]),
        ([], "svg.png", ["can't be used"]),
        (["--max_video_seconds", 30], "long.mp4", ["30 s", "-t 30"]),
        (["--max_pixels", 20000], "wide.mp4", ["0.02 megapixels", "scale"]),
        (["--max_visuals", 1], "b.mp4", ["up to 1 videos"]),
    ],
)
def test_a_file_that_can_not_be_used_is_named_with_the_fix(open_page, folder, flags, name, reasons):
    """And nothing else changes."""
    page = say(open_page(*flags), QUESTION, folder / "a.mp4")
    say(page, "More?", folder / name)
    (error,) = page.error
    for text in (*reasons, "wasn't asked"):
        assert text in error.value, error.value
    for text in (str(folder), "cinego-page", "<script"):
        assert text not in error.value
    assert len(conversation_of(page).attachments) == 1 and len(texts_of(page)) == 2
    own = own_folder(page)
    assert [path.suffix for path in own.iterdir()] == [".mp4"]
    assert not own.is_relative_to(ROOT) and own.parent.stat().st_mode & 0o077 == 0  # nobody else's
    say(page, "Still there?")
    assert not page.error and len(texts_of(page)) == 4


def test_what_a_user_names_is_shown_as_it_is(open_page, folder):
    nasty = "![x](y)<b>$1 `c` :red[d].mp4"
    page = open_page()
    page.chat_input[0].upload(nasty, (folder / "a.mp4").read_bytes()).set_value("*Hi* <b>$x$")
    page.run()
    assert texts_of(page)[0] == "*Hi* <b>$x$"
    shown = page.markdown[0].value
    assert escaped(nasty) in shown and "![x](y)" not in shown and "<b>" not in shown
    assert nasty in conversation_of(page).chat.format_transcript(".md")


def own_folder(page: AppTest) -> Path:
    return conversation_of(page).attachments[0].path.parent


# ---- models


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_checkpoint, tiny_tower) -> Path:
    """A folder like `out/`: two of ours, one exported, one of others; and what can't be chosen."""
    out = tmp_path_factory.mktemp("out")
    model = load_video_language_model(tiny_checkpoint)
    about = {"training": {"num_frames": 4, "vision_path": str(tiny_tower)}}
    about |= {"lineage": {"tokenizer": OURS}}
    for name in ("pretrain", "sft"):
        save_model(out / f"run/{name}.pth", model, about)
    save_model(out / "lm_32.pth", model.language_model, {})
    save_model(out / "theirs.pth", model, {})
    (out / "theirs.json").unlink()
    (out / "run/junk.pth").write_text("no checkpoint")
    paths = ["--vision_path", str(tiny_tower), "--tokenizer_path", str(TOKENIZER_PATH)]
    convert([str(out / "run/sft.pth"), str(out / "hf"), *paths])
    for number, name in enumerate(("run/pretrain.pth", "theirs.pth", "hf", "run/sft.pth")):
        os.utime(out / name, (number, number))
    return out


def test_the_models_of_a_folder_can_be_chosen(models, open_page, folder):
    found = find_models(models)
    names = [str(path.relative_to(models)) for path in found]
    assert names == ["run/sft.pth", "hf", "theirs.pth", "run/pretrain.pth"]
    page = open_page("--out_dir", models, "--device", "cpu", model=False)
    assert page.selectbox[0].options == names
    assert "0.3 M parameters with the tower, summary dct, 4 frames" in page.caption[1].value
    answers = []
    for path in found[:2]:  # each with its own tower, without a flag
        page.selectbox[0].set_value(str(path)).run()
        assert not page.exception and not page.error and not page.text
        answers.append(texts_of(say(page, QUESTION, folder / "a.mp4"))[1])
    assert answers[0] == answers[1]
    # What lies here is no CLIP ViT-B/32.
    page.selectbox[0].set_value(str(found[2])).run()
    assert page.error[0].value == "This model can't be loaded."
    assert "vision" in page.code[0].value and not page.exception


def test_wrong_flags_and_the_wrong_way_to_start_it_are_told(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["web_demo.py", "--load_from", "a b.pth"])
    with pytest.raises(SystemExit, match=r"streamlit run web_demo.py -- --load_from 'a b\.pth'"):
        web_demo.main()
    monkeypatch.setattr(sys, "argv", ["web_demo.py", "--load_form", "x"])
    with pytest.raises(ValueError, match="did you mean --load_from"):
        web_demo.main()
    page = AppTest.from_file(str(ROOT / "web_demo.py"), default_timeout=60).run()
    assert "python web_demo.py --help" in page.error[0].value
    assert PageFlags(num_frames=65).problems() == ["--num_frames is 65: give 64 or fewer"]


# ---- in a browser


@pytest.fixture(scope="module")
def server(model_flags, folder, tmp_path_factory):
    if MISSING and os.environ.get("CI") == "true":
        pytest.fail(MISSING)
    if MISSING:
        pytest.skip(MISSING)
    folders = "--out_dir", folder / "out", "--examples", folder / "examples"
    server = Page(tmp_path_factory.mktemp("page"), *model_flags, *folders, maxUploadSize=1)
    yield server
    server.stop()


@pytest.fixture
def new_user(server, tmp_path):
    browsers = []

    def new_user(language: str) -> Browser:
        browser = Browser(tmp_path / f"profile-{language}", language=language)
        browsers.append(browser)
        browser.open(server.url)
        return browser

    yield new_user
    for browser in browsers:
        browser.quit()


def status_for(server: Page, host: str, origin: str) -> str:
    """What a web page of `origin` gets which reaches the server by the name `host`."""
    lines = (
        "GET /_stcore/stream HTTP/1.1",
        *(f"Host: {host}:{server.port}", f"Origin: {origin}:{server.port}"),
        *("Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13"),
        *("Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==", "", ""),
    )
    with connect(server.port) as connection:
        connection.sendall("\r\n".join(lines).encode())
        return connection.recv(100).split()[1].decode()


def is_gone(url: str) -> bool:
    try:
        urlopen(url).close()
        return False
    except HTTPError as error:
        return error.code == 404


def pieces_seen(user: Browser, answer: str) -> list[str]:
    """What stood on the page of an answer in the making, one after the other."""
    seen = user.driver.execute_script("return window.seen")
    return [text for text in seen if text and answer.startswith(text)]


def test_two_users_in_their_browsers(server, new_user, chat_model, folder):
    assert status_for(server, "localhost", "http://localhost") == "101"
    assert status_for(server, "127.0.0.1", "http://evil.example") == "403"
    assert status_for(server, "evil.example", "http://evil.example") == "403"  # its name leads here

    expected = {n: chat_with(chat_model, (QUESTION, folder / f"{n}.mp4"))[1] for n in "ab"}
    assert expected["a"] != expected["b"]

    with ThreadPoolExecutor() as pool:  # browsers start slowly
        alice, bob = pool.map(new_user, ("en", "zh-CN"))
    assert "Attach a video" in alice.text() and "给它看一段视频" in bob.text()
    played = {}  # the addresses of their uploads
    for user, name in ((alice, "a"), (bob, "b")):
        user.attach(folder / f"{name}.mp4")
        user.driver.execute_script(WATCH)
        user.say(QUESTION)
    for user, name, other in ((alice, "a", "b"), (bob, "b", "a")):
        user.until(lambda user=user: user.answers(), "an answer")
        assert user.answers() == [expected[name]]
        text = user.text()
        assert f"{name}.mp4" in text and f"{other}.mp4" not in text
        # By whole characters, each time more.
        parts = pieces_seen(user, expected[name])
        assert parts == sorted(parts, key=len) and parts[-1] == expected[name]
        # The player plays the file, the strip has its frames with their seconds.
        (video,) = user.all("video")
        user.until(lambda video=video: video.get_property("readyState") > 0, "a film to play")
        assert (video.get_property("videoWidth"), video.get_property("duration")) == (128, 2)
        played[name] = video.get_property("currentSrc")
        with urlopen(played[name]) as reply:
            assert reply.headers["Content-Type"] == "video/mp4"
        frames = user.all(".cinego-frame")
        assert [frame.find_element(By.TAG_NAME, "time").text for frame in frames] == [
            *("0.2 s", "0.8 s", "1.2 s", "1.8 s")
        ]
        assert all(
            image.get_property("naturalWidth") == 128 for image in user.all(".cinego-frame img")
        )
    assert len(server.uploads()) == 2

    # A file that is too large isn't sent.
    alice.choose(folder / "large.mp4")
    alice.until(lambda: alice.all("[data-testid=stFileChipIconError]"), "a refusal")
    assert alice.answers() == [expected["a"]] and len(server.uploads()) == 2

    # What was uploaded goes with its user.
    bob.quit()
    alice.until(lambda: len(server.uploads()) == 1, "bob's file deleted")
    alice.until(lambda: is_gone(played["b"]), "bob's file no longer served", 30)
    alice.start_new()
    alice.until(lambda: not server.uploads(), "alice's file deleted")
    alice.until(lambda: "Attach a video" in alice.text(), "the greeting")
    assert alice.all("textarea")[0].get_property("value") == ""
    alice.attach(folder / "b.mp4")
    alice.say(QUESTION)
    alice.until(lambda: alice.answers() == [expected["b"]], "an answer")
    assert len(server.uploads()) == 1

    # Answers grow before the user's eyes. A browser that waits for a processor may miss how one of
    # them did, so there are a few.
    grew = False
    for number in range(2, 8):
        alice.driver.execute_script(WATCH)
        alice.say("Go on.")
        alice.until(lambda number=number: len(alice.answers()) == number, f"answer {number}")
        grew = len(pieces_seen(alice, alice.answers()[-1])) > 2
        if grew:
            break
    assert grew
    server.stop()
    assert not server.uploads() and "Traceback" not in "".join(server.log)
