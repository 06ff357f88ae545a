"""Answering: a batch, a stream and a chat say what each question alone would be told."""

import itertools
import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel

from dataset.conversation import ConversationError
from dataset.video import VideoError
from inference import TOKENIZER_PATH, VISION_PATH, Answerer, Question, Visual, parts_of
from model.cinego import Cinego
from model.config import SUMMARY_KINDS
from model.generate import Sampling
from model.video_summary import VideoSummary
from model.vision_tower import VisionTower

TOKENIZER = Path(__file__).resolve().parents[2] / "model/text_tokenizer"


@pytest.fixture(scope="module")
def answerer(tiny_checkpoint, tiny_tower) -> Answerer:
    return Answerer.load(tiny_checkpoint, tiny_tower, TOKENIZER, device="cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three pictures, a short animation, and a file that isn't a picture."""
    folder, random = tmp_path_factory.mktemp("visuals"), np.random.default_rng(0)
    for name in "abc":
        noise = random.integers(0, 255, (112, 112, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{name}.png")
    frames = [Image.new("RGB", (112, 80), (60 * i, 0, 255 - 60 * i)) for i in range(4)]
    frames[0].save(folder / "clip.gif", save_all=True, append_images=frames[1:], duration=100)
    (folder / "broken.mp4").write_text("not a video")
    return folder


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def alone(answerer, question: Question) -> str:
    return answerer.answer([question])[0]


# ---- what is seen


def test_a_file_becomes_a_visual_with_its_times_and_pictures(answerer, folder):
    clip = answerer.read(folder / "clip.gif", frames=56)
    assert clip.timestamps == pytest.approx([0, 0.1, 0.2, 0.3]) and clip.tag == "<video>"
    assert clip.features.shape == (4, 50, 32) and clip.features.dtype == torch.float16
    assert [picture.size for picture in clip.frames] == [(56, 40)] * 4
    assert answerer.read(folder / "a.png").tag == "<image>"
    assert len(answerer.read(folder / "clip.gif", num_frames=2).timestamps) == 2
    assert len(answerer.read(folder / "clip.gif", fps=5).timestamps) == 2
    with pytest.raises(VideoError, match=r"broken\.mp4"):
        answerer.read(folder / "broken.mp4")


def test_frames_are_taken_and_shaped_as_in_training(answerer, folder, tiny_tower):
    record = answerer.checkpoint.with_suffix(".json")
    about = json.loads(record.read_text())
    how = {"num_frames": 4, "sampling": "fps", "fps": 5.0, "resize": "pad"}
    try:
        record.write_text(json.dumps(about | {"training": how}))
        load = partial(Answerer.load, answerer.checkpoint, tiny_tower, TOKENIZER, device="cpu")
        trained = load()
        assert trained.transform.resize == "pad"
        assert len(trained.read(folder / "clip.gif").timestamps) == 2
        assert len(load(fps=10).read(folder / "clip.gif").timestamps) == 4
        assert (
            len(load(sampling="uniform").look([folder / "clip.gif"])[0].popitem()[1].features) == 4
        )
    finally:
        record.write_text(json.dumps(about))
    with pytest.raises(ValueError, match="needs --fps"):
        load(sampling="fps")


def test_a_file_that_can_not_be_read_is_named_and_the_rest_is_seen(answerer, folder):
    seen, failures = answerer.look([folder / "a.png", folder / "broken.mp4", folder / "c.png"])
    assert list(seen) == [folder / "a.png", folder / "c.png"]
    assert "broken.mp4" in failures[folder / "broken.mp4"]


def test_the_frame_that_shows_something_else_weighs_most(answerer):
    torch.manual_seed(0)
    still = torch.randn(50, 32).half()
    frames = still.expand(6, -1, -1).clone()
    assert answerer.frame_weights(Visual("still", frames, [])) == [1 / 6] * 6
    frames[4] += 1 + torch.randn(50, 32).half()
    weights = answerer.frame_weights(Visual("event", frames, []))
    assert weights.index(max(weights)) == 4 and sum(weights) == pytest.approx(1)
    assert weights[4] > 3 * max(weights[:4] + weights[5:]) > 0
    assert answerer.frame_weights(Visual("image", frames[:1], [])) == [1.0]


@pytest.mark.parametrize("kind", SUMMARY_KINDS)
def test_frames_are_weighed_whatever_the_summary(answerer, folder, kind):
    torch.manual_seed(0)
    summary = VideoSummary(kind, 32, 50).eval()
    model = Cinego(replace(answerer.model.config, summary=kind), answerer.model.vision_tower)
    model.video_summary = summary
    other = replace(answerer, model=model)
    clip = other.read(folder / "clip.gif")
    weights = other.frame_weights(clip)
    assert len(weights) == 4 and sum(weights) == pytest.approx(1) and min(weights) > 0
    # By hand, for one frame: how far the summary moves when the clip's mean stands in its place.
    frames = clip.features.float()
    moves = []
    with torch.inference_mode():
        for index in range(4):
            changed = torch.cat([frames[:index], frames.mean(0, True), frames[index + 1 :]])
            moves.append((summary(changed, [4]) - summary(frames, [4])).norm().item())
    assert weights == pytest.approx([move / sum(moves) for move in moves], rel=1e-4)


# ---- what goes with a checkpoint


def test_the_tower_and_the_tokenizer_of_training_are_found(tmp_path, monkeypatch, tiny_tower):
    """Where they lay then; a tower that moved by its weights; else the usual ones."""
    monkeypatch.chdir(tmp_path)
    record = tmp_path / "sft.json"

    def found(**about) -> tuple[str, str]:
        record.write_text(json.dumps(about))
        return tuple(map(str, parts_of(tmp_path / "sft.pth")))

    usual = (VISION_PATH, TOKENIZER_PATH)
    assert tuple(map(str, parts_of("nowhere.pth"))) == usual and found() == usual
    trained = {"vision_path": str(tiny_tower), "tokenizer_path": str(TOKENIZER)}
    assert found(training=trained) == (str(tiny_tower), str(TOKENIZER))
    # What training named isn't there any more, or (it read features) never was its tower.
    others = Path(VISION_PATH).parent
    shutil.copytree(tiny_tower, others / "other")
    twin = CLIPVisionModel(CLIPVisionConfig.from_pretrained(tiny_tower))
    twin.save_pretrained(others / "twin")
    narrow = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1
    )
    CLIPVisionModel(narrow).save_pretrained(VISION_PATH)
    (others / "empty").mkdir()
    (others / "broken").mkdir()
    (others / "broken/config.json").write_text("{}")
    about = {"model_config": {"vision_hidden_size": 32}}
    for name in ("other", "twin"):
        weights = VisionTower.from_pretrained(others / name).fingerprint()
        for named in ("gone", VISION_PATH):
            training = {"vision_path": named, "tokenizer_path": "gone"}
            expected = (str(others / name), TOKENIZER_PATH)
            assert found(training=training, lineage={"vision_tower": weights}, **about) == expected
    assert found(lineage={"vision_tower": "0" * 16}, **about)[0] == VISION_PATH
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/processor_config.json").write_text("{}")
    assert parts_of("hf") == (Path("hf"), Path("hf"))


# ---- batches


@pytest.fixture(scope="module")
def asked(answerer, folder) -> list[Question]:
    picture, other, clip = (answerer.read(folder / n) for n in ("a.png", "b.png", "clip.gif"))
    return [
        Question(user("What is it?"), [picture], Sampling(8)),
        Question(user("视频里有什么东西在动?"), [clip], Sampling(14, temperature=1.0, seed=3)),
        Question(user("Just words, no picture."), [], Sampling(5)),
        Question(user("<image> and <image>: the same?"), [picture, other], Sampling(8)),
        Question(user("And what moves?"), [clip], Sampling(9)),
        Question(user("What moves?"), [clip], Sampling(9)),
    ]


def test_a_batch_answers_as_each_question_alone(answerer, asked):
    texts = [alone(answerer, question) for question in asked]
    assert len(set(texts)) == len(texts)  # the model does depend on what it is asked
    assert answerer.answer(asked) == texts

    batch = answerer.batch()
    answers = batch.add(asked[:2])
    for question in asked[2:]:
        batch.step()
        answers += batch.add([question])
    pieces = {answer: [answer.take()] for answer in answers}
    while batch:
        for answer in batch.step():
            pieces[answer].append(answer.take())
    assert ["".join(pieces[answer]).strip() for answer in answers] == texts
    assert all(len(pieces[answer]) > 1 for answer in answers)


def test_what_questions_about_one_clip_share_is_read_once(answerer, asked):
    sizes = []
    handle = answerer.model.video_summary.register_forward_pre_hook(
        lambda module, args: sizes.append(list(args[1]))
    )
    try:
        answerer.answer([asked[4], asked[0], asked[5]])
    finally:
        handle.remove()
    assert sizes == [[4, 1]]


def test_questions_without_a_visual_are_answered_together_too(answerer):
    """They share their empty beginning, and nothing can be read of that."""
    questions = [Question(user(text)) for text in ("What is one?", "What is two?", "三?")]
    expected = [alone(answerer, question) for question in questions]
    assert answerer.answer(questions) == expected and len(set(expected)) > 1


def test_an_answer_knows_its_tokens_and_times(answerer, asked):
    batch = answerer.batch()
    (answer,) = batch.add(asked[1:2])
    while batch:
        batch.step()
    assert answer.completion_tokens <= 14 and answer.finish_reason in ("stop", "length")
    assert answer.prompt_tokens == len(answerer.encode(*asked_of(asked[1])).input_ids) > 50
    assert 0 < answer.time_to_first_token < answer.seconds and answer.tokens_per_second > 0


def asked_of(question: Question) -> tuple:
    return question.messages, question.visuals


def test_a_cancelled_answer_ends_where_it_is_and_the_others_go_on(answerer, asked):
    texts = [alone(answerer, question) for question in asked[:2]]
    batch = answerer.batch()
    first, second = batch.add(asked[:2])
    batch.step()
    batch.cancel(first)
    assert first.finish_reason == "cancelled" and len(batch) == 1
    batch.cancel(first)
    while batch:
        batch.step()
    assert texts[0].startswith(first.text.strip()) and second.text.strip() == texts[1]


def test_a_stop_text_ends_the_answer_before_it_and_is_never_shown(answerer, asked):
    question = replace(asked[0], sampling=Sampling(30))
    whole = alone(answerer, question)
    stop = whole[6:9]
    end = whole.index(stop)
    batch = answerer.batch()
    (answer,) = batch.add([replace(question, stop=("never said", stop))])
    pieces = [answer.take()]
    while batch:
        batch.step()
        pieces.append(answer.take())
    assert "".join(pieces).strip() == answer.text.strip() == whole[:end].strip()
    assert answer.finish_reason == "stop" and answer.completion_tokens < 30


@pytest.mark.parametrize("text", ["a 😀 杯子 龘龘 é!", "👩‍👩‍👧‍👦", "plain"])
def test_no_piece_splits_a_character(answerer, text, monkeypatch):
    """The model is made to say `text`, most of which takes several tokens a character."""
    ids = [
        *answerer.tokenizer.encode(text, add_special_tokens=False),
        answerer.tokenizer.eos_token_id,
    ]
    script = iter(ids)
    monkeypatch.setattr("model.generate.choose", lambda logits, rows: [next(script)])
    chat = answerer.chat()
    pieces = list(chat.ask("Say it."))
    assert "".join(pieces) == text and "\ufffd" not in pieces
    assert len(pieces) < len(ids)


def test_a_prompt_that_has_no_room_is_refused_before_it_joins(answerer, asked, monkeypatch):
    monkeypatch.setattr(answerer.model.config.language_model, "max_position_embeddings", 90)
    batch = answerer.batch()
    (fits,) = batch.add(asked[:1])
    long = replace(asked[0], sampling=Sampling(60))
    with pytest.raises(ConversationError, match="the model has positions for 90"):
        batch.add([asked[2], long])
    assert len(batch) == 1
    while batch:
        batch.step()
    assert fits.text.strip() == alone(answerer, asked[0])


# ---- chats

SHORT = Sampling(6)


def reads(answerer, chat, question: str, how=SHORT) -> int:
    """How many tokens the model reads until the first one of the answer."""
    lengths = []
    handle = answerer.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]),
        with_kwargs=True,
    )
    try:
        "".join(chat.ask(question, how))
    finally:
        handle.remove()
    return lengths[0]


def test_a_chat_reads_only_what_is_new_and_answers_as_if_it_read_all(answerer, folder):
    chat = answerer.chat()
    chat.show(answerer.read(folder / "clip.gif"))
    assert reads(answerer, chat, "What moves?") > 50
    assert chat.last.cached_tokens == 0
    assert reads(answerer, chat, "And now?") < 40
    chat.show(answerer.read(folder / "a.png"))
    assert 50 < reads(answerer, chat, "And this picture?") < 90
    assert reads(answerer, chat, "Are they alike?") < 40
    assert chat.last.cached_tokens > 100

    (clip, picture), turns = chat._visuals, chat.transcript
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * 4
    assert turns[0]["content"] == "<video>\nWhat moves?"
    assert turns[4]["content"] == "<image>\nAnd this picture?"
    for end, visuals in ((1, [clip]), (3, [clip]), (5, [clip, picture]), (7, [clip, picture])):
        said = alone(answerer, Question(turns[:end], visuals, Sampling(6)))
        assert turns[end]["content"] == (said or "-")


def test_another_visual_with_the_same_placeholder_is_read_anew(answerer, folder):
    first, second = answerer.read(folder / "a.png"), answerer.read(folder / "b.png")
    chat = answerer.chat()
    chat.show(first)
    "".join(chat.ask("What is it?"))
    question = Question(user("<image>\nWhat is it?"), [second], Sampling(8))
    batch = answerer.batch()
    (answer,) = batch.add([replace(question, memory=chat._memory)])
    while batch:
        batch.step()
    assert 0 < answer.cached_tokens < 50
    assert answer.text.strip() == alone(answerer, question)


def test_an_answer_that_is_cut_stays_as_far_as_it_was_shown(answerer, folder):
    chat = answerer.chat()
    chat.show(answerer.read(folder / "clip.gif"))
    pieces = chat.ask("What moves?", Sampling(300))
    shown = "".join(itertools.islice(pieces, 3))
    pieces.close()
    assert chat.last.finish_reason == "cancelled"
    assert chat.transcript[-1] == {"role": "assistant", "content": shown.strip()}
    "".join(chat.ask("And then?", SHORT))
    assert chat.last.cached_tokens > 50  # the video stays read; noise is tokenised in other ways


def test_an_interrupt_in_the_midst_of_a_step_leaves_nothing_half_read(answerer, folder):
    visual = answerer.read(folder / "clip.gif")
    chat = answerer.chat()
    chat.show(visual)
    "".join(chat.ask("What moves?", Sampling(6)))
    block = answerer.model.language_model.model.layers[1]

    def interrupt(module, args):
        raise KeyboardInterrupt

    pieces = chat.ask("And then?", Sampling(40))
    next(pieces)
    handle = block.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(pieces)
    handle.remove()
    "".join(chat.ask("Once more?", Sampling(6)))
    turns = chat.transcript
    assert len(turns) == 6
    assert turns[5]["content"] == alone(answerer, Question(turns[:5], [visual], Sampling(6)))


def test_a_question_that_can_not_be_asked_changes_nothing(answerer, folder):
    chat = answerer.chat()
    chat.show(answerer.read(folder / "clip.gif"))
    with pytest.raises(ConversationError, match="2 visual tags"):
        next(chat.ask("Is <video> like <video>?"))
    assert chat.transcript == []
    assert "".join(chat.ask("Is <video> nice?")) and len(chat.transcript) == 2


def test_a_chat_forgets_its_oldest_turns_but_not_the_video(answerer, folder):
    visual = answerer.read(folder / "clip.gif")
    chat = answerer.chat(system="Answer briefly.", context_tokens=150)
    chat.show(visual)
    for number in range(12):
        "".join(chat.ask(f"Question number {number}?", Sampling(4)))
        assert chat.last.prompt_tokens <= 150
    assert len(chat.transcript) == 24
    assert chat._visuals == [visual] and len(chat._turns) < 12
    assert chat._turns[0]["content"].startswith("<video>\nQuestion")
    system = [{"role": "system", "content": "Answer briefly."}]
    told = Question([*system, *chat._turns[:-1]], [visual], Sampling(4))
    assert chat._turns[-1]["content"] == (alone(answerer, told) or "-")
    # A cut makes room for several turns, so most of them go on from what was read.
    assert any(reads(answerer, chat, f"Number {n}?", Sampling(4)) < 40 for n in range(2))


def test_with_too_many_visuals_the_oldest_go(answerer, folder):
    chat = answerer.chat(context_tokens=120)
    for name in ("a", "b", "c"):
        chat.show(answerer.read(folder / f"{name}.png"))
    "".join(chat.ask("Which is the last?", Sampling(4)))
    assert [Path(v.name).stem for v in chat._visuals] == ["c"]
    assert chat._turns[0]["content"] == "<image>\nWhich is the last?"
