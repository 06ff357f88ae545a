"""Checkpoints: what is saved comes back exactly, and what doesn't fit says why."""

import json
import os
import resource

import pytest
import torch

from model.checkpoint import load_language_model, load_video_language_model, save_model
from model.cinego import Cinego
from model.config import CinegoConfig, LanguageModelConfig
from model.minimind import MiniMind

SMALL = LanguageModelConfig(64, 32, 2, 4, 2, rope_theta=1e4, qk_norm=True)
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 1, "norm_topk_prob": False}


def cinego(language_model=SMALL, **settings):
    torch.manual_seed(0)
    return Cinego(CinegoConfig(language_model, **{"vision_hidden_size": 16, **settings})).eval()


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("experts", [{}, EXPERTS], ids=["dense", "experts"])
def test_a_language_model_comes_back_with_its_config(tmp_path, experts):
    model = MiniMind(LanguageModelConfig(**SMALL.to_dict() | experts)).eval()
    save_model(tmp_path / "lm_32.pth", model, {"step": 7})

    loaded = load_language_model(tmp_path / "lm_32.pth")

    assert same_weights(model, loaded) and loaded.config == model.config and not loaded.training
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


MINIMIND3 = LanguageModelConfig(64, 32, 2, 4, 2, qk_norm=True, rms_norm_eps=1e-6)
MINIMIND2 = LanguageModelConfig(64, 48, 3, 8, 2)


@pytest.mark.parametrize("language_model", [MINIMIND3, MINIMIND2])
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


def test_the_wrong_loader_names_the_right_one_and_a_missing_file_itself(tmp_path):
    lm, vlm = tmp_path / "lm.pth", tmp_path / "vlm.pth"
    save_model(lm, MiniMind(SMALL), {})
    save_model(vlm, cinego(), {})
    for load, paths, reason in (
        (load_language_model, [vlm], "use load_video_language_model"),
        (load_video_language_model, [lm], "use load_language_model"),
        (load_video_language_model, [vlm, tmp_path / "nowhere"], "no vision tower in .*nowhere"),
        (load_language_model, ["nowhere.pth"], "no checkpoint nowhere.pth"),
    ):
        with pytest.raises(ValueError, match=reason):
            load(*paths)


def test_a_tied_head_may_be_in_the_file_and_an_untied_one_may_not(tmp_path):
    state = MiniMind(SMALL).state_dict()
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    torch.save(state, tmp_path / "tied.pth")
    load_language_model(tmp_path / "tied.pth")
    state["lm_head.weight"][0, 0] += 1
    torch.save(state, tmp_path / "untied.pth")
    with pytest.raises(ValueError, match="isn't tied"):
        load_language_model(tmp_path / "untied.pth")


def test_a_save_on_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    path, old = tmp_path / "lm.pth", MiniMind(SMALL)
    save_model(path, old, {})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # half of the weights' bytes
    try:
        with pytest.raises((OSError, RuntimeError)):
            save_model(path, MiniMind(SMALL), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert same_weights(load_language_model(path), old)
    assert sorted(os.listdir(tmp_path)) == ["lm.json", "lm.pth"]
