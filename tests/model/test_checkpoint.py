"""Checkpoints: what is saved comes back exactly, and what doesn't fit says why."""

import json
import os
import pickle

import pytest
import torch

from model.checkpoint import load_language_model, load_video_language_model, save_model
from model.cinego import Cinego
from model.config import CinegoConfig, LanguageModelConfig
from model.minimind import MiniMind

SMALL = LanguageModelConfig(64, 32, 2, 4, 2, rope_theta=1e4, qk_norm=True)


def cinego(language_model=SMALL, **settings):
    torch.manual_seed(0)
    return Cinego(CinegoConfig(language_model, **{"vision_hidden_size": 16, **settings})).eval()


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_language_model_comes_back_with_its_config(tmp_path):
    model = MiniMind(SMALL).eval()
    save_model(tmp_path / "lm_32.pth", model, {"step": 7})

    loaded = load_language_model(tmp_path / "lm_32.pth")

    assert same_weights(model, loaded) and loaded.config == SMALL and not loaded.training
    ids = torch.randint(0, 64, (1, 9))
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    about = json.loads((tmp_path / "lm_32.json").read_text())
    assert about["step"] == 7 and about["model"] == "MiniMind"
    assert sorted(os.listdir(tmp_path)) == ["lm_32.json", "lm_32.pth"]  # nothing half-written


@pytest.mark.parametrize("summary", ["dct", "gpt4video", "mean", "concat"])
def test_a_video_language_model_comes_back(tmp_path, summary):
    model = cinego(summary=summary, image_ids=[3] * 50)
    save_model(tmp_path / "sft.pth", model, {})
    loaded = load_video_language_model(tmp_path / "sft.pth")
    assert same_weights(model, loaded) and loaded.config == model.config


@pytest.mark.parametrize(
    "language_model",
    [
        LanguageModelConfig(64, 32, 2, 4, 2, qk_norm=True, rms_norm_eps=1e-6),  # as MiniMind-3
        LanguageModelConfig(64, 48, 3, 8, 2),  # as MiniMind2
    ],
)
@pytest.mark.parametrize("summary", ["dct", "gpt4video", "mean"])
def test_a_bare_state_dict_is_read_from_its_shapes(tmp_path, summary, language_model):
    model = cinego(language_model, summary=summary, num_temporal_filters=5)
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    loaded = load_video_language_model(tmp_path / "bare.pth")
    assert same_weights(model, loaded) and loaded.config.summary == summary
    assert loaded.config.language_model == language_model


def test_the_old_name_of_the_summary_still_loads(tmp_path):
    model = cinego(summary="ours")
    save_model(tmp_path / "sft.pth", model, {})
    about = (tmp_path / "sft.json").read_text()
    assert '"summary": "dct"' in about
    (tmp_path / "sft.json").write_text(about.replace('"summary": "dct"', '"summary": "ours"'))
    loaded = load_video_language_model(tmp_path / "sft.pth")
    assert same_weights(model, loaded) and loaded.config.summary == "dct"
    assert load_video_language_model(tmp_path / "sft.pth", summary="ours").config.summary == "dct"


def test_overrides_have_the_last_word(tmp_path):
    save_model(tmp_path / "a.pth", cinego(), {})
    loaded = load_video_language_model(tmp_path / "a.pth", rope_theta=5.0, image_ids=[1] * 50)
    assert loaded.config.language_model.rope_theta == 5.0
    assert loaded.config.image_ids == [1] * 50
    with pytest.raises(ValueError, match="rope_thetta"):
        load_video_language_model(tmp_path / "a.pth", rope_thetta=5.0)


def test_a_checkpoint_of_another_size_names_both_shapes(tmp_path):
    save_model(tmp_path / "lm.pth", MiniMind(SMALL), {})
    with pytest.raises(ValueError, match=r"\(64, 32\) in the file, \(64, 64\) in the model"):
        load_language_model(tmp_path / "lm.pth", hidden_size=64)
    with pytest.raises(ValueError, match=r"missing model.layers.2.self_attn.q_proj.weight"):
        load_language_model(tmp_path / "lm.pth", num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"unknown model.layers.1.self_attn.q_proj.weight"):
        load_language_model(tmp_path / "lm.pth", num_hidden_layers=1)


def test_the_wrong_kind_of_model_names_the_right_loader(tmp_path):
    save_model(tmp_path / "lm.pth", MiniMind(SMALL), {})
    save_model(tmp_path / "vlm.pth", cinego(), {})
    with pytest.raises(ValueError, match="use load_video_language_model"):
        load_language_model(tmp_path / "vlm.pth")
    with pytest.raises(ValueError, match="use load_language_model"):
        load_video_language_model(tmp_path / "lm.pth")


def test_a_tied_head_may_be_in_the_file_and_an_untied_one_may_not(tmp_path):
    state = MiniMind(SMALL).state_dict()
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    torch.save(state, tmp_path / "tied.pth")
    load_language_model(tmp_path / "tied.pth")
    state["lm_head.weight"][0, 0] += 1
    torch.save(state, tmp_path / "untied.pth")
    with pytest.raises(ValueError, match="isn't tied"):
        load_language_model(tmp_path / "untied.pth")


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def test_files_that_are_no_checkpoints_are_refused_and_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no checkpoint nowhere.pth"):
        load_language_model("nowhere.pth")
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04 half a file")
    (tmp_path / "evil.pth").write_bytes(
        pickle.dumps({"model.norm.weight": Malicious()}, protocol=2)
    )
    torch.save({"model": Malicious()}, "evil2.pth")
    torch.save([1, 2, 3], "list.pth")
    for name in ("cut.pth", "evil.pth", "evil2.pth", "list.pth"):
        with pytest.raises(ValueError, match=name):
            load_language_model(name)
    assert not os.path.exists("pwned")


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "lm.pth"
    old = MiniMind(SMALL)
    save_model(path, old, {})

    def disk_full(state, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(OSError, match="disk full"):
        save_model(path, MiniMind(SMALL), {})
    assert same_weights(load_language_model(path), old)
    assert sorted(os.listdir(tmp_path)) == ["lm.json", "lm.pth"]
