import builtins
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval as evaluation
from dataset.samples import read_samples
from inference import ChatModel
from model.checkpoint import save_model
from model.cinego import Cinego
from model.config import CinegoConfig, LanguageModelConfig
from model.generate import Sampling
from model.tokenizer import OURS

TOKENIZER = Path(__file__).resolve().parents[1] / "model/text_tokenizer"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """An untrained model: it answers nonsense, but always the same nonsense to the same input."""
    torch.manual_seed(1)
    language_model = LanguageModelConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
    )
    # Large weights, or every input would get the same answer.
    language_model.initializer_range, language_model.embedding_std = 0.3, 0.4
    model = Cinego(CinegoConfig(language_model, vision_hidden_size=32))
    path = tmp_path_factory.mktemp("model") / "sft.pth"
    save_model(path, model, {"training": {"num_frames": 4}, "lineage": {"tokenizer": OURS}})
    return path


@pytest.fixture(scope="module")
def chat_model(checkpoint, tiny_tower) -> ChatModel:
    return ChatModel.load(checkpoint, tiny_tower, TOKENIZER, device="cpu")


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three pictures (clips of one frame), a short animation, and a file that isn't a picture."""
    random = np.random.default_rng(0)
    for name in "abc":
        noise = random.integers(0, 255, (112, 112, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{name}.png")
    frames = [Image.new("RGB", (112, 112), (60 * i, 0, 255 - 60 * i)) for i in range(4)]
    frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:], duration=100)
    (tmp_path / "broken.mp4").write_text("not a video")
    return tmp_path


def write_lines(folder: Path, *lines: dict) -> Path:
    path = folder / "test.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def line(visual, *turns: str, **more) -> dict:
    """Turns: question, answer, question, answer, …"""
    roles = ("user", "assistant") * (len(turns) // 2)
    conversations = [
        {"role": role, "content": turn} for role, turn in zip(roles, turns, strict=True)
    ]
    return {"video": visual, "conversations": conversations, **more}


def run(monkeypatch, checkpoint, tower, *flags) -> None:
    flags = ["--load_from", checkpoint, "--vision_path", tower, "--max_new_tokens", 6, *flags]
    flags += ["--tokenizer_path", TOKENIZER, "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, flags)])
    evaluation.main()


# ---- controls


def dice(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("num_frames", [3, 4, 8, 16])
def test_shuffled_is_neither_the_order_nor_its_reverse(num_frames):
    order = list(range(num_frames))
    for seed in range(20):
        shuffled = evaluation.shuffled_order(num_frames, dice(seed))
        assert sorted(shuffled) == order
        assert shuffled not in (order, order[::-1])
        assert shuffled == evaluation.shuffled_order(num_frames, dice(seed))


@pytest.mark.parametrize("num_frames", [1, 2])
def test_too_few_frames_to_shuffle_stay(num_frames):
    assert evaluation.shuffled_order(num_frames, dice(0)) == list(range(num_frames))


def test_controls_equal_changing_the_frames_themselves(chat_model):
    torch.manual_seed(0)
    pixels = torch.randn(4, 3, 112, 112)
    features = chat_model.encode_frames(pixels)
    change = evaluation.controls(chat_model, seed=0)
    order = evaluation.shuffled_order(4, dice(0))
    for name, changed in {
        "normal": pixels,
        "reversed": pixels.flip(0),
        "shuffled": pixels[order],
        "first frame": pixels[[0, 0, 0, 0]],
    }.items():
        torch.testing.assert_close(
            change[name](features), chat_model.encode_frames(changed), msg=name
        )
    blank = change["no video"](features)
    assert blank.shape == features.shape
    torch.testing.assert_close(blank, change["no video"](torch.zeros_like(features)))


def test_later_turns_are_asked_after_the_models_own_answers(folder):
    write_lines(folder, line("a.png", "one?", "true 1", "two?", "true 2", "three?", "true 3"))
    (sample,) = read_samples(folder / "test.jsonl")
    contents = [m["content"] for m in evaluation.asked(sample, ["own 1", "own 2"])]
    assert contents == ["one?", "own 1", "two?", "own 2", "three?"]
    assert [m["content"] for m in evaluation.asked(sample, [])] == ["one?"]


def test_evaluation_scores_each_turn_and_leaves_out_what_can_not_be_read(
    monkeypatch, checkpoint, tiny_tower, folder, chat_model, capsys
):
    clip = chat_model.encode_video(folder / "clip.gif")
    reverse = replace(clip, features=clip.features.flip(0))
    question = [{"role": "user", "content": "What moves?"}]
    said, backwards = chat_model.generate(
        [chat_model.make_request(question, [visual], Sampling(6)) for visual in (clip, reverse)]
    )
    assert said != backwards

    scoring = [{"type": "object"}]
    data = write_lines(
        folder,
        line("clip.gif", "What moves?", said, scoring=scoring, language="en"),
        line("clip.gif", "What moves?", backwards, scoring=scoring, language="en", reverse=True),
        line("a.png", "What is it?", "never said", "And now?", "nor this"),
        line("broken.mp4", "What is it?", "lost", id="lost"),
    )
    output = folder / "out/eval.json"
    run(
        *(monkeypatch, checkpoint, tiny_tower, "--data_path", data, "--images_path", folder),
        *("--controls", "--output", output, "--batch_size", 2),
    )
    result = json.loads(output.read_text())
    assert result["accuracy"]["by_type"] == {"answer": 0, "object": 1}
    assert result["controls"]["reversed"]["by_type"]["object"] == 0
    assert result["samples"] == 3 and result["clips"] == 2 and result["num_frames"] == 4
    assert [a["question"] for a in result["answers"] if a["type"] == "answer"] == [
        *("What is it?", "And now?")
    ]
    assert list(result["left_out"]) == [str(folder / "broken.mp4")]
    said = capsys.readouterr()
    assert "1 samples were left out" in said.out and "broken.mp4" in said.err
    assert re.search(r"all questions +4 ", said.out)


# ---- the terminal


def test_without_a_terminal_each_file_of_the_folder_is_asked_about(
    monkeypatch, checkpoint, tiny_tower, folder, capsys
):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    run(monkeypatch, checkpoint, tiny_tower, "--eval_dir", folder)
    said = capsys.readouterr().out
    assert said.count(f"Q: {evaluation.DEFAULT_QUESTION}\nA: ") == 4
    assert f"{folder / 'broken.mp4'}: unreadable" in said


def test_a_chat_goes_on_with_what_was_said_before(
    monkeypatch, checkpoint, tiny_tower, folder, capsys
):
    typed = iter(["What is it?", "", "Which colour?", "/quit"])
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(builtins, "input", lambda prompt: next(typed))
    run(monkeypatch, checkpoint, tiny_tower, "--image", folder / "a.png")
    assert capsys.readouterr().out.count("A: ") == 2


# ---- what a user can get wrong


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--load_from", "nowhere.pth"], "train/train_sft_512_8.sh"),
        (["--load_from", "nowhere.pth", "--model_mode", "0", "--dim", "768"], "pretrain_768_16.sh"),
        (["--dim", "512"], "--dim 32, not 512"),
        (["--n_layers", "8"], "--n_layers 2, not 8"),
        (["--vision_path", "nowhere"], "nowhere"),
        (["--tokenizer_path", "nowhere"], "--tokenizer_path nowhere: no such folder"),
        (["--video", "nowhere.mp4"], "none of the files can be read"),
        (["--eval_dir", "nowhere"], "no video or image in nowhere"),
    ],
)
def test_an_error_says_what_is_wrong(flags, words, monkeypatch, checkpoint, tiny_tower, folder):
    files = [] if "--video" in flags or "--eval_dir" in flags else ["--image", folder / "a.png"]
    given = ["--load_from", checkpoint, "--vision_path", tiny_tower, *files, *flags]
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, given)])
    with pytest.raises(SystemExit, match=re.escape(words)):
        evaluation.main()


def test_another_tower_of_the_same_shape_is_refused(tmp_path, checkpoint, tiny_tower):
    """Its features would fit and mean nothing."""
    weights = torch.load(checkpoint, weights_only=True)
    torch.save(weights, tmp_path / "sft.pth")
    about = json.loads(checkpoint.with_suffix(".json").read_text()) | {
        "lineage": {"vision_tower": "0" * 16, "tokenizer": OURS}
    }
    (tmp_path / "sft.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="isn't the vision tower"):
        ChatModel.load(tmp_path / "sft.pth", tiny_tower, TOKENIZER)


@pytest.mark.parametrize(
    "text, reason",
    [
        ("{", "not JSON"),
        ('{"video": "a.png"}', "conversations"),
        (json.dumps(line("a.png", "<video> <video>", "a cup")), "2 visual tags"),
        (json.dumps(line("../a.png", "What is it?", "a cup")), "'..'"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(
    text, reason, monkeypatch, checkpoint, tiny_tower, folder
):
    data = write_lines(folder, line("a.png", "What is it?", "a cup"))
    data.write_text(data.read_text() + text + "\n")
    with pytest.raises(SystemExit, match=r"test\.jsonl:2: .*" + re.escape(reason)):
        run(monkeypatch, checkpoint, tiny_tower, "--data_path", data, "--images_path", folder)


def test_scoring_and_chatting_at_once_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["eval.py", "--data_path", "x.jsonl", "--video", "a.mp4"])
    with pytest.raises(SystemExit):
        evaluation.main()
    assert "--data_path scores" in capsys.readouterr().err
