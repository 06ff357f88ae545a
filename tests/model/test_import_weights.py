"""Every MiniMind that was published gives its own logits here; what isn't one says so, and no more.

The references are written out in the old conventions, or are transformers' own models.
"""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from safetensors.torch import save_model as save_shared
from torch import nn

from model.checkpoint import load_language_model, load_video_language_model, save_model
from model.config import LanguageModelConfig
from model.minimind import MiniMind
from tests.model.ancestors import add_projector, cinego_2025, old_forward, old_state, with_experts

ROOT = Path(__file__).resolve().parents[2]
SMALL = LanguageModelConfig(64, 32, 2, 4, 2)


def write(path, state):
    if path.suffix == ".safetensors":
        # A file of safetensors has no two names for one tensor.
        save_file({name: weight.clone() for name, weight in state.items()}, path)
    else:
        torch.save(state, path)
    return path


def close(logits, expected, atol=1e-4):
    torch.testing.assert_close(logits, expected, atol=atol, rtol=0)


def refused(path, reason):
    with pytest.raises(ValueError, match=reason):
        load_language_model(path)


# ---- what the generations' own code gave


def golden(name):
    with safe_open(ROOT / f"tests/data/golden/{name}.safetensors", "pt") as file:
        meta = json.loads(file.metadata()["meta"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    state = {k.removeprefix("sd."): v for k, v in tensors.items() if k.startswith("sd.")}
    names = {"num_attention_heads": "n_heads", "num_key_value_heads": "n_kv_heads"}
    names |= {"rope_theta": "rope_theta", "rms_norm_eps": "norm_eps"}
    settings = {name: meta[theirs] for name, theirs in names.items()}
    return state, settings, tensors, meta.get("image_ids")


@pytest.mark.parametrize("name", ["minimind_v1_lm", "minimind2_2025_02_lm", "minimind3_lm"])
def test_a_golden_language_model_gives_its_own_logits(tmp_path, name):
    state, settings, tensors, _ = golden(name)
    for suffix, given in ((".pth", {}), (".safetensors", settings)):
        lm = load_language_model(write(tmp_path / f"lm{suffix}", state), **given)
        close(lm(tensors["io.input_ids"]).logits, tensors["io.logits"])
        assert {name: getattr(lm.config, name) for name in settings} == settings
        assert bool(lm.load_report.assumed) != bool(given)


def test_a_golden_minimind_v_gives_its_own_logits(tmp_path):
    state, _, tensors, image_ids = golden("minimind_v1_vlm")
    vlm = load_video_language_model(write(tmp_path / "vlm.pth", state))
    features = tensors["io.features"].flatten(0, 1)
    visuals = {"visual_features": features, "frames_per_visual": [1] * len(features)}
    close(vlm(tensors["io.input_ids"], **visuals).logits, tensors["io.logits"])
    assert vlm.config.summary == "mean" and vlm.config.image_ids == image_ids


# ---- the first two generations, written out in tests/model/ancestors.py


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "experts"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "theta", "title", "given"),
    [
        (8, 4, 1e4, "MiniMind, Oct 2024", {}),
        (8, 2, 1e6, "MiniMind2, Feb 2025", {}),
        # Names and shapes leave these open: what is given decides, or the report says the guess.
        (4, 2, 1e6, "MiniMind, Oct 2024", {"rope_theta": 1e6, "num_attention_heads": 4}),
    ],
)
def test_old_names_and_pairs(tmp_path, heads, kv_heads, theta, title, given, moe):
    state = old_state(heads=heads, kv_heads=kv_heads)
    if moe:
        state, title = with_experts(state), f"{title}, mixture of 4 experts"
    lm = load_language_model(write(tmp_path / "lm.pth", state), **given)
    ids = torch.randint(0, 96, (1, 40))
    expected = old_forward(state, state["tok_embeddings.weight"][ids[0]], heads, kv_heads, theta)
    close(lm(ids).logits[0], expected)
    assert lm.load_report.title == title
    assert ("num_attention_heads 8, rope_theta 1" in str(lm.load_report)) != bool(given)


@pytest.mark.parametrize(
    ("width", "kv_width", "expected"),
    [
        (512, 256, (16, 8, 1e4)),  # minimind-v1-small
        (768, 384, (16, 8, 1e4)),  # minimind-v1
        (512, 128, (8, 2, 1e6)),  # MiniMind2-Small
        (768, 192, (8, 2, 1e6)),  # MiniMind2
    ],
)
def test_full_sizes_are_told_apart_by_their_keys(tmp_path, width, kv_width, expected):
    state = old_state(width=width, heads=width, kv_heads=kv_width, layers=1)
    config = load_language_model(write(tmp_path / "lm.pth", state)).config
    assert (config.num_attention_heads, config.num_key_value_heads, config.rope_theta) == expected


# ---- the last two, against transformers


def transformers_model(family, **settings):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        **{
            **{"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "head_dim": 8},
            **{"num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2},
            **{"rope_theta": 1e6, "rms_norm_eps": 1e-5, "tie_word_embeddings": True},
            **{"initializer_range": 0.2, **settings},
        }
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:  # ones hide a norm that was forgotten
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model


MINIMIND3 = {"num_key_value_heads": 4, "rms_norm_eps": 1e-6}
MOE = {"num_experts": 4, "num_experts_per_tok": 1, "norm_topk_prob": True}
MOE |= {"moe_intermediate_size": 96, **MINIMIND3}
GENERATIONS = {
    "Llama": ("MiniMind2, Apr 2025", {}),
    "Qwen3": ("MiniMind-3", MINIMIND3),
    "Qwen3Moe": ("MiniMind-3, mixture of 4 experts", MOE),
}


@pytest.mark.parametrize("name", ["model.safetensors", ""], ids=["weights alone", "directory"])
@pytest.mark.parametrize("family", GENERATIONS)
def test_transformers_names_and_directories(tmp_path, family, name):
    title, settings = GENERATIONS[family]
    if not name:  # no shape would tell these
        settings = settings | {"rope_theta": 3e4, "num_attention_heads": 4, "head_dim": 16}
    theirs = transformers_model(family, **settings)
    theirs.save_pretrained(tmp_path)
    lm = load_language_model(tmp_path / name)
    ids = torch.randint(0, 96, (2, 30))
    close(lm(ids).logits, theirs(ids).logits)
    assert lm.load_report.title == title and bool(lm.load_report.assumed) == bool(name)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "gemma"}, "no model_type gemma"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "no rope_type yarn"),
        ({"hidden_act": "gelu"}, "no hidden_act gelu"),
        ({"scoring_func": "sigmoid"}, "no scoring_func sigmoid"),
        ({"hidden_size": "big"}, "impossible settings"),
        ({"intermediate_size": 100}, r"\(128, 64\) in the file, \(100, 64\) in the model"),
    ],
)
def test_a_directory_of_another_architecture_is_refused(tmp_path, change, reason):
    refused(tmp_path, "has config.json and model.safetensors or")  # while it is empty
    transformers_model("Llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    refused(tmp_path, reason)


def test_minimind2_apr_with_experts(tmp_path):
    """The names of ours; its directory names the numbers as the Feb 2025 config did."""
    moe = {"num_experts": 3, "num_shared_experts": 2, "num_experts_per_tok": 2}
    model = MiniMind(LanguageModelConfig(**SMALL.to_dict() | moe)).eval()
    ids = torch.randint(0, 64, (1, 9))
    write(tmp_path / "model.safetensors", model.state_dict())
    about = {"model_type": "minimind", "num_attention_heads": 4, "use_moe": True}
    about |= {"n_routed_experts": 3, "num_experts_per_tok": 2, "norm_topk_prob": True}
    about |= {"scoring_func": "softmax", "intermediate_size": 64, "rope_theta": 1e6}
    (tmp_path / "config.json").write_text(json.dumps(about))
    lm = load_language_model(tmp_path)
    assert torch.equal(lm(ids).logits, model(ids).logits)
    assert lm.load_report.title == "MiniMind2, Apr 2025, mixture of 3 experts"
    single = about | {"num_experts_per_tok": 1}  # whose weight MiniMind2 doesn't scale to 1
    (tmp_path / "config.json").write_text(json.dumps(single))
    assert not load_language_model(tmp_path).config.norm_topk_prob


# ---- whole models


def test_minimind_v_on_oct_2024_with_experts(tmp_path):
    state = with_experts(old_state(heads=8, kv_heads=4))
    weight, bias = add_projector(state, "vision_proj.vision_proj.0", 24)
    ids = torch.tensor([1, 2] + [30] * 25 + [32] * 25 + [5, 6, 7])
    features = torch.randn(1, 50, 24)
    x = state["tok_embeddings.weight"][ids]
    x[2:52] = features[0] @ weight.T + bias

    vlm = load_video_language_model(write(tmp_path / "vlm.pth", state))
    logits = vlm(ids[None], visual_features=features, frames_per_visual=[1]).logits[0]

    close(logits, old_forward(state, x, 8, 4, 1e4))
    title = "MiniMind-V on MiniMind, Oct 2024, mixture of 4 experts"
    assert vlm.load_report.title == title
    assert "image_ids 30 x 25 + 32 x 25" in str(vlm.load_report)


def test_cinego_2025(tmp_path):
    """Two branches of queries over the flattened frames and themselves, added, projected."""
    tokens, width, frames = 197, 32, 3
    state, branches = cinego_2025(width, tokens)
    features = torch.randn(frames, tokens, width)
    summary = 0
    for queries, attention in branches:
        keys = torch.cat([features.flatten(0, 1)[None], queries], dim=1)
        summary = summary + attention(queries, keys, keys)[0][0]
    state["vision_encoder.vision_model.post_layernorm.weight"] = torch.ones(width)
    ids = torch.tensor([1, 2] + [34] * tokens + [5, 6, 7])
    x = state["tok_embeddings.weight"][ids]
    rows = summary @ state["vision_proj.weight"].T + state["vision_proj.bias"]
    x[2 : 2 + tokens] = rows.detach()

    vlm = load_video_language_model(write(tmp_path / "vlm.pth", state))
    logits = vlm(ids[None], visual_features=features, frames_per_visual=[frames]).logits[0]

    close(logits, old_forward(state, x, 8, 2, 1e6))
    assert (vlm.config.summary, vlm.config.image_ids) == ("gpt4video", [34] * tokens)
    assert vlm.load_report.title == "Cinego 2025 on MiniMind2, Feb 2025"
    assert vlm.load_report.left_out == ["vision_encoder.vision_model.post_layernorm.weight"]


def test_a_directory_of_cinego_2025_brings_its_settings(tmp_path):
    """Its model_type is ours, and its config is MiniMind2's with image_ids."""
    state, _ = cinego_2025(32, tokens=50, heads=4, kv_heads=2)
    torch.save(state, tmp_path / "pytorch_model.bin")
    about = {"model_type": "cinego", "dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2}
    about |= {"rope_theta": 3e4, "norm_eps": 1e-5, "image_ids": [7] * 50, "vocab_size": 96}
    (tmp_path / "config.json").write_text(json.dumps(about))
    vlm = load_video_language_model(tmp_path)
    ids = torch.randint(0, 96, (1, 40))
    expected = old_forward(state, state["tok_embeddings.weight"][ids[0]], 4, 2, 3e4)
    close(vlm(ids).logits[0], expected)
    assert vlm.config.image_ids == [7] * 50 and not vlm.load_report.assumed


# ---- how files are written


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod."])
def test_wrappers_leave_their_prefix_and_tables_are_left_out(tmp_path, prefix):
    state = old_state()
    plain = load_language_model(write(tmp_path / "plain.pth", state))
    tables = {"pos_cis": torch.polar(torch.ones(5, 4), torch.ones(5, 4))}
    tables["layers.0.attention.mask"] = torch.zeros(1, 1, 5, 5)
    wrapped = {prefix + name: weight for name, weight in (state | tables).items()}
    lm = load_language_model(write(tmp_path / "wrapped.pth", wrapped))
    assert all(torch.equal(a, b) for a, b in zip(lm.parameters(), plain.parameters(), strict=True))
    assert lm.load_report.left_out == [prefix + name for name in tables]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_float32(tmp_path, dtype):
    state = {name: weight.to(dtype) for name, weight in MiniMind(SMALL).state_dict().items()}
    lm = load_language_model(write(tmp_path / "lm.pth", state), num_attention_heads=4)
    assert {parameter.dtype for parameter in lm.parameters()} == {torch.float32}
    assert all(torch.equal(w, state[name].float()) for name, w in lm.state_dict().items())


def test_a_tied_weight_may_stand_under_the_heads_name_alone(tmp_path):
    theirs, ids = transformers_model("Llama"), torch.randint(0, 96, (2, 30))
    save_shared(theirs, tmp_path / "lm.safetensors")
    assert "model.embed_tokens.weight" not in load_file(tmp_path / "lm.safetensors")
    close(load_language_model(tmp_path / "lm.safetensors")(ids).logits, theirs(ids).logits)


def test_tensors_that_share_memory_in_the_file_learn_apart(tmp_path):
    state = MiniMind(SMALL).state_dict()
    one, other = (f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2))
    state[other] = state[one]
    lm = load_language_model(write(tmp_path / "lm.pth", state), num_attention_heads=4)
    with torch.no_grad():
        lm.get_parameter(one).zero_()
    assert lm.get_parameter(other).any()


# ---- hostile and broken files


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kept", [0, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path, suffix, kept):
    path = write(tmp_path / f"cut{suffix}", old_state())
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    refused(path, f"cut{suffix} isn't a readable state dict")


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(1).expand(64, 10**12),  # four bytes that claim to be terabytes
        *(torch.zeros(32, dtype=torch.int8), torch.zeros(32).to_sparse()),
    ],
)
def test_a_tensor_that_is_no_plain_weight_is_named(tmp_path, weight):
    torch.save(old_state() | {"layers.0.ffn_norm.weight": weight}, tmp_path / "lm.pth")
    refused(tmp_path / "lm.pth", r"whole tensors.*layers.0.ffn_norm.weight")


def test_misfits_are_all_named(tmp_path):
    state = with_experts(old_state())
    del state["layers.1.attention.wo.weight"], state["norm.weight"]
    del state["layers.1.feed_forward.experts.2.w3.weight"]
    state["layers.0.feed_forward.gate.bias"] = torch.ones(4)
    state["layers.0.attention.wo.lora"] = torch.ones(2, 2)
    state |= {f"zz_adapter.{i}": torch.ones(1) for i in range(50)}  # which hide nothing else
    state["layers.0.ffn_norm.weight"] = torch.ones(63)
    with pytest.raises(ValueError) as error:
        load_language_model(write(tmp_path / "lm.pth", state))
    for part in (
        "missing model.layers.1.self_attn.o_proj.weight",
        "missing model.norm.weight",
        "missing model.layers.1.mlp.experts.2.up_proj.weight",
        "unknown model.layers.0.mlp.gate.bias",
        "unknown model.layers.0.self_attn.o_proj.lora",
        "model.layers.0.post_attention_layernorm.weight is (63,) in the file, (64,) in the model",
        "unknown zz_adapter.0",
        "46 more",
    ):
        assert part in str(error.value)
    assert len(str(error.value)) < 2000


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"num_hidden_layers": 10**9}, "20 tensors, which are no 1000000000 layers"),
        ({"num_hidden_layers": "2"}, "impossible settings"),
        ({"hidden_size": 10**18}, "impossible settings"),
        ({"num_attention_heads": "8"}, "impossible settings"),
        ({"num_key_value_heads": 0}, "num_key_value_heads must be a positive number"),
        ({"language_model": 3}, "doesn't hold a model_config"),
    ],
)
def test_settings_that_no_model_has_are_refused(tmp_path, settings, reason):
    save_model(tmp_path / "lm.pth", MiniMind(SMALL), {})
    about = json.loads((tmp_path / "lm.json").read_text())
    about["model_config"] |= settings
    (tmp_path / "lm.json").write_text(json.dumps(about))
    refused(tmp_path / "lm.pth", reason)


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({"model": old_state(), "step": 3}, r"'model' is a dict; save the model's state_dict"),
        (old_state() | {"module.norm.weight": torch.zeros(64)}, "has model.norm.weight twice"),
        ({"conv1.weight": torch.ones(3, 3)}, r"isn't a MiniMind.*conv1.weight"),
        ([1, 2, 3], "isn't a state dict but a list"),
    ],
)
def test_a_file_that_holds_something_else_says_what(tmp_path, state, reason):
    refused(write(tmp_path / "lm.pth", state), reason)
