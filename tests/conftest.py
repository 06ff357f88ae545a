"""What several tests need and no user does."""

import multiprocessing.util
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

from model.checkpoint import save_model
from model.cinego import Cinego
from model.config import CinegoConfig, LanguageModelConfig
from model.tokenizer import OURS


def pytest_configure(config: pytest.Config) -> None:
    """What tests, and the processes that they start, leave in the system's folder for temporary
    files goes with the run; pytest's own folders stay there, for a look at a failure."""
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
    os.environ["TMPDIR"] = tempfile.tempdir = folder = tempfile.mkdtemp(prefix="cinego-tests-")
    # At exit, after multiprocessing has removed its own folder in there (priority -100).
    multiprocessing.util.Finalize(None, shutil.rmtree, (folder, True), exitpriority=-101)


@pytest.fixture(scope="session")
def tiny_tower(tmp_path_factory) -> Path:
    """A random tower in CLIP's format: 50 tokens of 32 a frame of 112 pixels. What it sees means
    little, but the same clip always looks the same."""
    directory = tmp_path_factory.mktemp("tower")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "image_size": 112, "patch_size": 16}
    CLIPVisionModel(CLIPVisionConfig(**shape)).save_pretrained(directory)
    size, half = {"size": {"shortest_edge": 112}, "crop_size": 112}, [0.5] * 3
    CLIPImageProcessorPil(**size, image_mean=half, image_std=half).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """An untrained model for the tiny tower: it answers nonsense, but always the same nonsense to
    the same input."""
    torch.manual_seed(1)
    # Large weights, or every input would get the same answer.
    large = {"initializer_range": 0.3, "embedding_std": 0.4}
    language_model = LanguageModelConfig(6400, 32, 2, 2, 1, **large)
    path = tmp_path_factory.mktemp("model") / "sft.pth"
    model = Cinego(CinegoConfig(language_model, vision_hidden_size=32))
    save_model(path, model, {"training": {"num_frames": 4}, "lineage": {"tokenizer": OURS}})
    return path
