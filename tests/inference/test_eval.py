import json
import re
import sys

import pytest
import torch
from PIL import Image

import eval as evaluation
from cli import launch
from inference.parts import ROOT
from inference.test_set import CONTROLS, shuffled_order

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
