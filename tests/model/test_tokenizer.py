"""Which tokenizer it is, and whether it is the one that a model was trained with."""

import json
from pathlib import Path

import pytest
import torch

from inference import ChatModel
from model.checkpoint import load_video_language_model, save_model
from model.cinego import Cinego
from model.config import CinegoConfig, LanguageModelConfig
from model.tokenizer import (
    MINIMIND_2024,
    MINIMIND_2026,
    OURS,
    open_tokenizer,
    tokenizer_fingerprint,
)
from tests.model.ancestors import add_projector, cinego_2025, old_state

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {
    OURS: ROOT / "model/text_tokenizer",
    MINIMIND_2024: ROOT / "tests/data/tokenizers/minimind_v1",
    MINIMIND_2026: ROOT / "tests/data/tokenizers/minimind_3",
}


@pytest.mark.parametrize("fingerprint", FOLDERS)
def test_a_fingerprint_is_of_what_gives_text_its_ids(fingerprint, tmp_path):
    tokenizer = open_tokenizer(FOLDERS[fingerprint])
    assert tokenizer_fingerprint(tokenizer) == fingerprint
    tokenizer.chat_template, tokenizer.model_max_length = "{{ messages }}", 7
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content, indent=3, sort_keys=True))  # laid out in another way
    assert tokenizer_fingerprint(open_tokenizer(tmp_path)) == fingerprint
    merges = content["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]
    file.write_text(json.dumps(content))
    other = tokenizer_fingerprint(open_tokenizer(tmp_path))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<new>"]})
    assert len({fingerprint, other, tokenizer_fingerprint(tokenizer)}) == 3


def test_what_ships_is_found_from_any_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert len(open_tokenizer("model/text_tokenizer")) == 6400
    with pytest.raises(ValueError, match="--tokenizer_path no/such: no such folder"):
        open_tokenizer("no/such")


def minimind_v_2024() -> dict:
    state = old_state(width=64, kv_heads=4, layers=1, vocab=6400)
    add_projector(state, "vision_proj.vision_proj.0", 32)
    return state


def minimind_v_2026() -> dict:
    config = LanguageModelConfig(6400, 64, 1, 4, qk_norm=True)
    return Cinego(CinegoConfig(config, "mean", 32)).state_dict()


@pytest.mark.parametrize(
    ("make_state", "own"),
    [
        (minimind_v_2024, MINIMIND_2024),
        (lambda: cinego_2025(32, tokens=50, layers=1, vocab=6400)[0], MINIMIND_2024),
        (minimind_v_2026, MINIMIND_2026),
    ],
)
def test_whoever_talks_to_a_minimind_v_needs_its_tokenizer(make_state, own, tmp_path, tiny_tower):
    torch.save(make_state(), tmp_path / "vlm.pth")
    for fingerprint, folder in FOLDERS.items():
        about = tmp_path / "vlm.pth", tiny_tower, folder
        assert ChatModel.load(*about, device="cpu", accept_tokenizer=fingerprint != own)
        if fingerprint != own:
            with pytest.raises(ValueError, match=r"isn't the tokenizer that(.|\n)*curl -fL"):
                ChatModel.load(*about, device="cpu")


def test_our_checkpoints_know_their_tokenizer(tmp_path, tiny_tower, tiny_checkpoint):
    own = FOLDERS[OURS]
    assert ChatModel.load(tiny_checkpoint, tiny_tower, own, device="cpu")
    with pytest.raises(ValueError, match="Give --tokenizer_path model/text_tokenizer"):
        ChatModel.load(tiny_checkpoint, tiny_tower, FOLDERS[MINIMIND_2024], device="cpu")
    before_fingerprints = load_video_language_model(tiny_checkpoint)
    save_model(tmp_path / "vlm.pth", before_fingerprints, {})
    with pytest.raises(ValueError, match="worse than by chance"):
        ChatModel.load(tmp_path / "vlm.pth", tiny_tower, own, device="cpu")
