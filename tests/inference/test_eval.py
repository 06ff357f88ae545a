import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import eval as evaluation
from cli import launch
from dataset.samples import read_samples
from inference import ROOT, ChatModel
from inference.scoring import prompt_messages
from inference.test_set import CONTROLS, shuffled_order
from model.generate import Sampling


def write_lines(folder: Path, *lines: dict) -> Path:
    path = folder / "test.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def line(visual, *turns: str, **more) -> dict:
    """Turns: question, answer, question, answer, …"""
    roles = ("user", "assistant") * (len(turns) // 2)
    turns = [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=True)]
    return {"video": visual, "conversations": turns, **more}


# ---- controls


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("num_frames", [1, 2, 3, 4, 8, 16])
def test_shuffled_is_neither_the_order_nor_its_reverse(num_frames):
    order = list(range(num_frames))
    for seed in range(20):
        shuffled = shuffled_order(num_frames, generator(seed))
        assert sorted(shuffled) == order
        assert shuffled == shuffled_order(num_frames, generator(seed))
        # Fewer than three frames have no other order.
        assert (shuffled in (order, order[::-1])) is (num_frames < 3)


def test_controls_equal_changing_the_frames_themselves(chat_model):
    pixels = torch.randn(4, 3, 112, 112, generator=generator(0))
    order = shuffled_order(4, generator(7))
    frames, grey = chat_model.encode_frames(pixels), chat_model.encode_frames(pixels[:1] * 0)
    for name, changed in {
        "normal": pixels,
        "reversed": pixels.flip(0),
        "shuffled": pixels[order],
        "first frame": pixels[[0, 0, 0, 0]],
        "no video": pixels * 0,
    }.items():
        features = CONTROLS[name](frames, grey, generator(7))
        torch.testing.assert_close(features, chat_model.encode_frames(changed), msg=name)


# ---- a test set


def test_later_turns_are_asked_after_the_models_own_answers(tmp_path):
    lines = line("a.png", "one?", "true 1", "two?", "true 2", "three?", "true 3")
    (sample,) = read_samples(write_lines(tmp_path, lines))
    contents = [m["content"] for m in prompt_messages(sample, ["own 1", "own 2"])]
    assert contents == ["one?", "own 1", "two?", "own 2", "three?"]
    assert [m["content"] for m in prompt_messages(sample, [])] == ["one?"]


def test_evaluation_scores_each_turn_and_leaves_out_what_can_not_be_read(
    run, folder, chat_model, tmp_path
):
    clip = chat_model.encode_video(folder / "clip.gif")
    reverse = replace(clip, features=clip.features.flip(0))
    question = [{"role": "user", "content": "What moves?"}]
    requests = [chat_model.make_request(question, [v], Sampling(6)) for v in (clip, reverse)]
    forward, backward = chat_model.generate(requests)
    assert forward != backward

    about = {"scoring": [{"type": "object"}], "language": "en"}
    data = write_lines(
        tmp_path,
        line("clip.gif", "What moves?", forward, **about),
        line("clip.gif", "What moves?", backward, **about, reverse=True),
        line("a.png", "What is it?", "never said", "And now?", "nor this"),
        line("broken.mp4", "What is it?", "lost", id="lost"),
    )
    output = tmp_path / "out/eval.json"
    files = ("--data_path", data, "--images_path", folder, "--output", output)
    printed = run(*files, "--controls", "--batch_size", 2)
    result = json.loads(output.read_text())
    assert result["accuracy"]["by_type"] == {"answer": 0, "object": 1}
    assert result["controls"]["reversed"]["by_type"]["object"] == 0
    assert result["samples"] == 3 and result["num_frames"] == 4
    lines = (tmp_path / "out/eval.answers.jsonl").read_text().splitlines()[1:]
    questions = [[turn["question"] for turn in json.loads(line)["turns"]] for line in lines]
    assert sorted(questions) == [
        ["What is it?"],
        ["What is it?", "And now?"],
        *[["What moves?"]] * 2,
    ]
    assert list(result["left_out"]) == ["broken.mp4"] and 0 < result["interval"]["low"] < 0.5
    assert "1 samples were left out" in printed.out and "broken.mp4" in printed.err
    assert re.search(r"all questions +4 ", printed.out)


# ---- the terminal


def test_without_a_terminal_each_file_of_the_folder_is_asked_about(run, folder):
    printed = run("--eval_dir", folder).out
    assert printed.count(f"Q: {evaluation.DEFAULT_QUESTION}\nA: ") == 4
    assert f"{folder / 'broken.mp4'}: unreadable" in printed


def test_in_a_fresh_clone_the_small_model_answers_about_the_examples(monkeypatch, capsys, tmp_path):
    """And says that it knows nothing else, and when it is shown something else."""
    monkeypatch.chdir(tmp_path)
    Image.effect_noise((112, 112), 90).convert("RGB").save("noise.png")

    def run(*flags) -> str:
        monkeypatch.setattr(sys, "argv", ["eval.py", "--device", "cpu", *flags])
        launch(evaluation.main)
        return capsys.readouterr().out

    printed = run()
    assert "This small model knows only the demo world" in printed
    assert "A: Four red squares move left.\n" in printed
    assert "look nothing like" not in printed
    assert "look nothing like" in run("--image", "noise.png", "--question", "What is it?")


def test_the_small_model_answers_the_examples_questions_by_their_order(run, tmp_path):
    examples, output = ROOT / "demo/examples", tmp_path / "eval.json"
    files = ("--data_path", examples / "questions.jsonl", "--images_path", examples)
    model = ("--load_from", ROOT / "demo/model/sft_videolm_128.pth", "--vision_path")
    run(*model, ROOT / "demo/tower", *files, "--max_new_tokens", 64, "--output", output)
    accuracy = json.loads(output.read_text())["accuracy"]
    assert accuracy["all"] > 0.9 and accuracy["reversed"] > 0.7


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
        (["--data_path", "x.jsonl", "--video", "a.mp4"], "--data_path scores"),
        (["--chat", "--joint"], "choose one"),
        (["--batch_size", "0"], "give 1 or more"),
    ],
)
def test_an_error_says_what_is_wrong(flags, words, run, folder):
    named = {"--video", "--eval_dir", "--data_path"} & set(flags)
    files = [] if named else ["--image", folder / "a.png"]
    with pytest.raises(SystemExit, match=re.escape(words)):
        run(*files, *flags)


def test_another_tower_of_the_same_shape_is_refused(tmp_path, tiny_checkpoint, tiny_tower):
    """Its features would fit and mean nothing."""
    weights = torch.load(tiny_checkpoint, weights_only=True)
    torch.save(weights, tmp_path / "sft.pth")
    about = json.loads(tiny_checkpoint.with_suffix(".json").read_text())
    about["lineage"]["vision_tower"] = "0" * 16
    (tmp_path / "sft.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="isn't the vision tower"):
        ChatModel.load(tmp_path / "sft.pth", tiny_tower)


@pytest.mark.parametrize(
    "text, reason",
    [
        ("{", "not JSON"),
        ('{"video": "a.png"}', "conversations"),
        (json.dumps(line("a.png", "<video> <video>", "a cup")), "2 visual tags"),
        (json.dumps(line("../a.png", "What is it?", "a cup")), "'..'"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(text, reason, run, folder, tmp_path):
    data = write_lines(tmp_path, line("a.png", "What is it?", "a cup"))
    data.write_text(data.read_text() + text + "\n")
    with pytest.raises(SystemExit, match=r"test\.jsonl:2: .*" + re.escape(reason)):
        run("--data_path", data, "--images_path", folder)
