"""Requests to answers: a batch, a stream and a chat give what each request alone would get."""

import itertools
import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from dataset.conversation import ConversationError
from dataset.video import VideoError
from inference.chat import Chat
from inference.chat_model import ChatModel
from inference.parts import TOKENIZER_PATH, VISION_PATH, find_parts
from inference.request import PrefixCache, Sequence, Visual
from model.cinego import Cinego
from model.config import SUMMARY_KINDS
from model.generate import Sampling
from model.video_summary import VideoSummary
from model.vision_tower import VisionTower
from tests.clips import damage_packet, make_clip


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def alone(chat_model, messages, visuals, sampling) -> str:
    return chat_model.generate([chat_model.make_request(messages, visuals, sampling)])[0]


# ---- files to visuals


def test_a_file_becomes_a_visual_with_its_times(chat_model, folder):
    clip = chat_model.encode_video(folder / "clip.gif")
    assert clip.timestamps == pytest.approx([0, 0.1, 0.2, 0.3]) and clip.tag == "<video>"
    assert clip.features.shape == (4, 50, 32) and clip.features.dtype == torch.float16
    assert chat_model.encode_video(folder / "a.png").tag == "<image>"
    assert len(chat_model.encode_video(folder / "clip.gif", num_frames=2).timestamps) == 2
    assert len(chat_model.encode_video(folder / "clip.gif", fps=5).timestamps) == 2
    with pytest.raises(VideoError, match=r"broken\.mp4"):
        chat_model.encode_video(folder / "broken.mp4")


def test_frames_are_taken_and_shaped_as_in_training(chat_model, folder, tiny_tower, tmp_path):
    how = {"num_frames": 4, "sampling": "fps", "fps": 5.0, "resize": "pad"}
    clip, copy = folder / "clip.gif", Path(shutil.copy(chat_model.checkpoint, tmp_path))
    about = json.loads(chat_model.checkpoint.with_suffix(".json").read_text())
    load = partial(ChatModel.load, copy, tiny_tower, TOKENIZER_PATH, device="cpu")
    copy.with_suffix(".json").write_text(json.dumps(about | {"training": how}))
    trained = load()
    assert trained.transform.resize == "pad"
    assert len(trained.encode_video(clip).timestamps) == 2
    assert len(load(fps=10).encode_video(clip).timestamps) == 4
    assert len(load(sampling="uniform").encode_videos([(clip, None)])[0].popitem()[1].features) == 4
    copy.with_suffix(".json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="needs --fps"):
        load(sampling="fps")
    about["lineage"]["vision_tower"] = "0" * 16  # its features would fit and mean nothing
    copy.with_suffix(".json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="isn't the vision tower"):
        load()


def test_a_damaged_file_is_taken_as_a_player_shows_it_and_told(chat_model, tmp_path):
    path = make_clip(tmp_path / "clip.mp4", 60, frames=24)
    seconds = damage_packet(path, lambda packets: packets[12])
    visual = chat_model.encode_video(path)
    assert len(visual.features) == 4 and visual.damaged == [pytest.approx(seconds, abs=0.1)]
    visual.damaged *= 2  # two packets within a tenth of a second
    assert f"clip.mp4 is damaged near {seconds:.1f} s;" in visual.warnings[0]
    assert (path, None) in chat_model.encode_videos([(path, None)])[1]  # scores stay strict


@pytest.mark.parametrize("kind", SUMMARY_KINDS)
def test_frame_weights_are_how_far_each_frame_moves_the_summary(chat_model, folder, kind):
    torch.manual_seed(0)
    summary = VideoSummary(kind, 32, 50).eval()
    model = Cinego(replace(chat_model.model.config, summary=kind), chat_model.model.vision_tower)
    model.video_summary = summary
    other = replace(chat_model, model=model)
    clip = other.encode_video(folder / "clip.gif")
    frames, moves = clip.features.float(), []
    with torch.inference_mode():
        for index in range(4):  # by hand: the clip's mean in place of a frame
            changed = torch.cat([frames[:index], frames.mean(0, True), frames[index + 1 :]])
            moves.append((summary(changed, [4]) - summary(frames, [4])).norm().item())
    weights = other.frame_weights(clip)
    assert weights == pytest.approx([move / sum(moves) for move in moves], rel=1e-4)
    still = Visual("still", clip.features[:1].expand(6, -1, -1), [])
    assert other.frame_weights(still) == [1 / 6] * 6
    assert other.frame_weights(Visual("image", clip.features[:1], [])) == [1.0]


# ---- what goes with a checkpoint


def test_the_tower_and_the_tokenizer_of_training_are_found(tmp_path, monkeypatch, tiny_tower):
    """Where they lay then; a tower that moved by its weights; else the usual ones."""
    usual_towers = tmp_path / "towers/usual"
    monkeypatch.setattr("inference.parts.VISION_PATH", usual_towers)
    monkeypatch.setattr("inference.parts.DEMO_TOWER", tmp_path / "no tower")
    record, tokenizer = tmp_path / "sft.json", Path(TOKENIZER_PATH)

    def found(**about) -> tuple[Path, Path]:
        record.write_text(json.dumps(about))
        return find_parts(tmp_path / "sft.pth")

    assert find_parts("nowhere.pth") == found() == (usual_towers, tokenizer)
    assert tokenizer.is_dir() and tokenizer.is_absolute() and Path(VISION_PATH).is_absolute()
    trained = {"vision_path": str(tiny_tower), "tokenizer_path": str(tokenizer)}
    assert found(training=trained) == (tiny_tower, tokenizer)
    # What training named isn't there any more, or (it read features) never was its tower.
    others = usual_towers.parent
    shutil.copytree(tiny_tower, others / "other")
    CLIPVisionModel(CLIPVisionConfig.from_pretrained(tiny_tower)).save_pretrained(others / "twin")
    narrow = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1
    )
    CLIPVisionModel(narrow).save_pretrained(usual_towers)
    (others / "broken").mkdir()
    (others / "broken/config.json").write_text("{}")
    about = {"model_config": {"vision_hidden_size": 32}}
    for name in ("other", "twin"):
        weights = VisionTower.from_pretrained(others / name).fingerprint()
        for named in ("gone", str(usual_towers)):
            training = {"vision_path": named, "tokenizer_path": "gone"}
            expected = (others / name, tokenizer)
            assert found(training=training, lineage={"vision_tower": weights}, **about) == expected
    assert found(lineage={"vision_tower": "0" * 16}, **about)[0] == usual_towers
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/processor_config.json").write_text("{}")
    assert find_parts(tmp_path / "hf") == (tmp_path / "hf", tmp_path / "hf")


# ---- batches


@pytest.fixture(scope="module")
def asked(chat_model, folder) -> list[tuple]:
    names = ("a.png", "b.png", "clip.gif")
    picture, other, clip = (chat_model.encode_video(folder / name) for name in names)
    return [
        (user("What is it?"), [picture], Sampling(8)),
        (user("视频里有什么东西在动?"), [clip], Sampling(14, temperature=1.0, seed=3)),
        (user("Just words, no picture."), [], Sampling(5, repetition_penalty=1.5)),
        (user("<image> and <image>: the same?"), [picture, other], Sampling(8)),
        (user("And what moves?"), [clip], Sampling(9)),
        (user("What moves?"), [clip], Sampling(9)),
    ]


@pytest.fixture
def sequences(chat_model, asked) -> list[Sequence]:
    return [Sequence(chat_model.make_request(*each)) for each in asked]


def test_a_batch_answers_as_each_request_alone(chat_model, asked, sequences):
    texts = [alone(chat_model, *each) for each in asked]
    assert len(set(texts)) == len(texts)  # the model does depend on what it is asked
    assert chat_model.generate([each.request for each in sequences]) == texts

    engine = chat_model.engine()  # some join later
    engine.add(sequences[:2])
    for sequence in sequences[2:]:
        engine.step()
        engine.add([sequence])
    pieces = {sequence: [sequence.take_text()] for sequence in sequences}
    while engine.sequences:
        for sequence in engine.step():
            pieces[sequence].append(sequence.take_text())
    assert ["".join(pieces[each]).strip() for each in sequences] == texts
    assert all(len(pieces[each]) > 1 for each in sequences)


def test_what_requests_about_one_clip_share_is_read_once(chat_model, sequences):
    sizes = []
    handle = chat_model.model.video_summary.register_forward_pre_hook(
        lambda module, args: sizes.append(list(args[1]))
    )
    try:
        chat_model.engine().add([sequences[4], sequences[0], sequences[5]])
    finally:
        handle.remove()
    assert sizes == [[4, 1]]


def test_requests_without_a_visual_are_answered_together_too(chat_model):
    """They share their empty beginning, and nothing can be read of that."""
    asked = [(user(text), [], Sampling(8)) for text in ("What is one?", "What is two?", "三?")]
    expected = [alone(chat_model, *each) for each in asked]
    requests = [chat_model.make_request(*each) for each in asked]
    assert chat_model.generate(requests) == expected and len(set(expected)) > 1


def test_a_cancelled_sequence_ends_where_it_is_and_the_others_continue(
    chat_model, asked, sequences
):
    texts = [alone(chat_model, *each) for each in asked[:2]]
    engine, (first, second) = chat_model.engine(), sequences[:2]
    engine.add([first, second])
    engine.step()
    engine.cancel(first)
    assert first.finish_reason == "cancelled" and engine.sequences == [second]
    engine.cancel(first)
    while engine.sequences:
        engine.step()
    assert texts[0].startswith(first.text.strip()) and second.text.strip() == texts[1]


def test_a_stop_text_ends_the_answer_before_it_and_is_never_given_out(chat_model, asked):
    messages, visuals, _ = asked[0]
    whole = alone(chat_model, messages, visuals, Sampling(30))
    stop = whole[6:9]
    stops = ("never said", stop)
    sequence = Sequence(chat_model.make_request(messages, visuals, Sampling(30), stops))
    pieces = list(chat_model.engine().stream(sequence))
    expected = whole[: whole.index(stop)].strip()
    assert "".join(pieces).strip() == sequence.text.strip() == expected
    assert sequence.finish_reason == "stop" and sequence.completion_tokens < 30


@pytest.mark.parametrize("text", ["a 😀 杯子 龘龘 é!", "👩‍👩‍👧‍👦", "plain"])
def test_no_piece_splits_a_character(chat_model, text):
    """Most of these take several tokens a character."""
    tokenizer = chat_model.tokenizer
    sequence, pieces = Sequence(chat_model.make_request(user("Say it."))), []
    ids = tokenizer.encode(text, add_special_tokens=False)
    for token in [*ids, tokenizer.eos_token_id]:
        sequence.append(token, tokenizer)
        pieces.append(sequence.take_text())
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces)
    assert sequence.finish_reason == "stop" and len(list(filter(None, pieces))) <= len(ids)


# ---- chats

SHORT = Sampling(6)


def reads(chat_model, chat, question: str, how=SHORT) -> int:
    """How many tokens the model reads until the first one of the answer."""
    lengths = []
    handle = chat_model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]),
        with_kwargs=True,
    )
    try:
        "".join(chat.ask(question, how))
    finally:
        handle.remove()
    return lengths[0]


@pytest.fixture
def clip(chat_model, folder) -> Visual:
    return chat_model.encode_video(folder / "clip.gif")


@pytest.fixture
def chat(chat_model, clip) -> Chat:
    chat = Chat(chat_model)
    chat.attach(clip)
    return chat


def test_a_chat_reads_only_what_is_new_and_answers_as_if_it_read_all(
    chat_model, chat, clip, folder
):
    picture = chat_model.encode_video(folder / "a.png")
    assert reads(chat_model, chat, "What moves?") > 50
    assert chat.last.cached_tokens == 0
    assert reads(chat_model, chat, "And now?") < 40
    chat.attach(picture)
    assert 50 < reads(chat_model, chat, "And this picture?") < 90
    assert reads(chat_model, chat, "Are they alike?") < 40
    assert chat.last.cached_tokens > 100

    turns = chat.transcript
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * 4
    assert turns[0]["content"] == "<video>\nWhat moves?"
    assert turns[4]["content"] == "<image>\nAnd this picture?"
    for end, visuals in ((1, [clip]), (3, [clip]), (5, [clip, picture]), (7, [clip, picture])):
        assert turns[end]["content"] == (alone(chat_model, turns[:end], visuals, SHORT) or "-")


def test_another_visual_with_the_same_placeholder_is_read_again(chat_model, folder):
    first, second = (chat_model.encode_video(folder / name) for name in ("a.png", "b.png"))
    cache, question = PrefixCache(), (user("<image>\nWhat is it?"),)
    answers = []
    for visual in (first, second):
        request = chat_model.make_request(*question, [visual], Sampling(8), prefix_cache=cache)
        sequence = Sequence(request)
        answers.append("".join(chat_model.engine().stream(sequence)).strip())
        assert answers[-1] == alone(chat_model, *question, [visual], Sampling(8))
    assert 0 < sequence.cached_tokens < 50


def test_an_answer_that_is_cut_stays_as_far_as_it_came(chat):
    pieces = chat.ask("What moves?", Sampling(300))
    given = "".join(itertools.islice(pieces, 3))
    pieces.close()
    assert chat.last.finish_reason == "cancelled"
    assert chat.transcript[-1] == {"role": "assistant", "content": given.strip()}
    "".join(chat.ask("And then?", SHORT))
    assert chat.last.cached_tokens > 50  # the video stays read; noise is tokenised in other ways


def test_an_interrupt_in_the_midst_of_a_step_leaves_nothing_half_read(chat_model, chat, clip):
    "".join(chat.ask("What moves?", SHORT))
    block = chat_model.model.language_model.model.layers[1]

    def interrupt(module, args):
        raise KeyboardInterrupt

    pieces = chat.ask("And then?", Sampling(40))
    next(pieces)
    handle = block.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(pieces)
    handle.remove()
    "".join(chat.ask("Once more?", SHORT))
    turns = chat.transcript
    assert len(turns) == 6
    assert turns[5]["content"] == alone(chat_model, turns[:5], [clip], SHORT)


def test_a_question_that_can_not_be_asked_changes_nothing(chat):
    with pytest.raises(ConversationError, match="2 visual tags"):
        next(chat.ask("Is <video> like <video>?"))
    assert chat.transcript == []
    assert "".join(chat.ask("Is <video> nice?")) and len(chat.transcript) == 2


def test_a_chat_forgets_its_oldest_turns_but_not_the_video(chat_model, clip):
    chat = Chat(chat_model, context_tokens=150)
    chat.attach(clip)
    for number in range(12):
        "".join(chat.ask(f"Question number {number}?", Sampling(4)))
        assert chat.last.prompt_tokens <= 150
    assert len(chat.transcript) == 24
    request = chat.last.request
    assert request.visuals == [clip] and len(request.messages) < 12
    assert request.messages[0]["content"].startswith("<video>\nQuestion")
    answer = alone(chat_model, request.messages, [clip], Sampling(4))
    assert chat.transcript[-1]["content"] == (answer or "-")
    # A cut leaves capacity for several turns, so most of them continue from what was read.
    assert any(reads(chat_model, chat, f"Number {n}?", Sampling(4)) < 40 for n in range(2))


def test_with_too_many_visuals_the_oldest_go(chat_model, folder):
    chat = Chat(chat_model, context_tokens=120)
    for name in ("a", "b", "b c"):
        chat.attach(chat_model.encode_video(folder / f"{name}.png"))
    "".join(chat.ask("Which is the last?", Sampling(4)))
    request = chat.last.request
    assert [Path(visual.name).stem for visual in request.visuals] == ["b c"]
    assert request.messages[0]["content"] == "<image>\nWhich is the last?"
