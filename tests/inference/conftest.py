"""What the tests of eval.py, terminal, page and server share."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import eval as evaluation
from cli import launch
from inference.chat_model import ChatModel
from inference.parts import TOKENIZER_PATH


@pytest.fixture(scope="session")
def chat_model(tiny_checkpoint, tiny_tower) -> ChatModel:
    """In float32: then a batch answers exactly as each request alone."""
    paths = (tiny_checkpoint, tiny_tower, TOKENIZER_PATH)
    return ChatModel.load(*paths, device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """Three pictures, an animation of four frames, and a file that isn't a video; only to read."""
    folder, random = tmp_path_factory.mktemp("visuals"), np.random.default_rng(0)
    for name in ("a", "b", "b c"):
        noise = random.integers(0, 255, (112, 112, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{name}.png")
    frames = [Image.new("RGB", (112, 80), (60 * i, 0, 255 - 60 * i)) for i in range(4)]
    frames[0].save(folder / "clip.gif", save_all=True, append_images=frames[1:], duration=100)
    (folder / "broken.mp4").write_text("not a video")
    return folder


@pytest.fixture
def run(monkeypatch, tiny_checkpoint, tiny_tower, capsys):
    """Runs eval.py with flags and without a terminal; what it printed, and its warnings. The first
    of a flag that is given twice doesn't count."""

    def run(*flags) -> tuple[str, str]:
        given = ["--load_from", tiny_checkpoint, "--vision_path", tiny_tower, "--device", "cpu"]
        given += ["--max_new_tokens", 6, *flags]
        monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, given)])
        monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
        capsys.readouterr()
        launch(evaluation.main)
        return capsys.readouterr()

    return run
