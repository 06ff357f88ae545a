"""What several tests need and no user does."""

import json
from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel


@pytest.fixture(scope="session")
def tiny_tower(tmp_path_factory) -> Path:
    """A random tower in CLIP's format: 50 tokens of 32 a frame of 112 pixels. What it sees means
    little, but the same clip always looks the same."""
    directory = tmp_path_factory.mktemp("tower")
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=112,
        patch_size=16,
    )
    CLIPVisionModel(config).save_pretrained(directory)
    preprocessor = {
        "size": {"shortest_edge": 112},
        "crop_size": {"height": 112, "width": 112},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (directory / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return directory
