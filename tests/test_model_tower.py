"""The vision tower, and the two named sizes with a full-size one."""

import os

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel

from model.cinego import Cinego
from model.config import CinegoConfig, LanguageModelConfig
from model.vision_tower import VisionTower

TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 4, "image_size": 32, "patch_size": 8}


@pytest.fixture
def clip():
    torch.manual_seed(0)
    return CLIPVisionModel(CLIPVisionConfig(**TINY)).eval()


def test_features_are_what_a_hook_on_the_encoder_sees(clip, tmp_path):
    clip.save_pretrained(tmp_path)
    tower = VisionTower.from_pretrained(tmp_path)
    seen = []
    clip.encoder.register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
    pixels = torch.randn(3, 3, 32, 32)
    clip(pixels)
    features = tower(pixels)
    assert features.shape == (3, tower.tokens_per_frame, tower.hidden_size) == (3, 17, 32)
    torch.testing.assert_close(features, seen[0])
    assert not features.requires_grad


def test_a_whole_clip_model_gives_its_vision_half_without_a_warning(tmp_path, capfd):
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 50}
    text |= {"num_attention_heads": 4, "bos_token_id": 1, "eos_token_id": 2}
    whole = CLIPModel(CLIPConfig(text_config=text, vision_config=TINY)).eval()
    whole.save_pretrained(tmp_path)
    capfd.readouterr()
    tower = VisionTower.from_pretrained(tmp_path)
    assert "UNEXPECTED" not in capfd.readouterr().err
    pixels = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(tower(pixels), whole.vision_model(pixels).last_hidden_state)


def test_the_fingerprint_is_of_the_weights(clip):
    before = VisionTower(clip).fingerprint()
    assert before == VisionTower(clip).fingerprint()
    clip.encoder.layers[1].mlp.fc1.bias[3] += 1e-3
    assert VisionTower(clip).fingerprint() != before


def test_a_missing_or_broken_tower_says_what_to_put_there(clip, tmp_path):
    with pytest.raises(ValueError, match=r"no vision tower in .*nowhere(.|\n)*hf download"):
        VisionTower.from_pretrained(tmp_path / "nowhere")
    clip.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="can't read the weights"):
        VisionTower.from_pretrained(tmp_path)
    os.remove(weights)
    with pytest.raises(ValueError, match="can't read the weights"):
        VisionTower.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="'bert' model, not CLIP"):
        VisionTower.from_pretrained(tmp_path)


def test_weights_that_lack_a_layer_are_refused(clip, tmp_path):
    from safetensors.torch import load_file, save_file

    clip.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    lost = next(name for name in state if name.endswith("layers.1.mlp.fc1.weight"))
    del state[lost]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lack .*layers.1.mlp.fc1.weight"):
        VisionTower.from_pretrained(tmp_path)


def test_frames_of_another_size_are_refused(clip):
    with pytest.raises(ValueError, match="32 x 32 pixels, not 224 x 224"):
        VisionTower(clip)(torch.randn(1, 3, 224, 224))


def test_pixels_and_features_give_the_same_logits_and_the_tower_is_not_saved(clip):
    tower = VisionTower(clip)
    config = CinegoConfig(LanguageModelConfig(64, 32, 2, 4), "ours", 32, 17)
    model, pixels = Cinego(config, tower).eval(), torch.randn(5, 3, 32, 32)
    inputs = {
        "input_ids": torch.randint(0, 64, (2, 20)),
        "visual_mask": (torch.arange(20) < 17).expand(2, -1),
        "frames_per_visual": [4, 1],
    }
    torch.testing.assert_close(
        model(**inputs, pixel_values=pixels).logits,
        model(**inputs, visual_features=tower(pixels)).logits,
    )
    parts = {name.split(".")[0] for name in model.state_dict()}
    assert parts == {"language_model", "video_summary", "vision_proj"}
    model.train()
    assert not tower.model.training
    with pytest.raises(ValueError, match="17 tokens of 32 a frame, but the model was made for 50"):
        Cinego(CinegoConfig(), tower)


@pytest.mark.parametrize("width, layers, heads, expected", [(512, 8, 8, 26e6), (768, 16, 8, 104e6)])
def test_the_named_sizes_train_a_step_with_a_full_size_tower(width, layers, heads, expected):
    torch.manual_seed(0)
    tower = VisionTower(CLIPVisionModel(CLIPVisionConfig(image_size=224, patch_size=32)))
    config = LanguageModelConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads
    )
    model = Cinego(CinegoConfig(config), tower).train()
    counts = model.parameter_counts()
    print(f"{width} x {layers}:", counts)
    assert counts["language_model"] == pytest.approx(expected, rel=0.05)
    assert counts["vision_tower"] == pytest.approx(87.5e6, rel=0.01)

    ids = torch.randint(0, 6400, (1, 60))
    step = {
        "input_ids": ids,
        "visual_mask": (torch.arange(60) < 50)[None],
        "pixel_values": torch.randn(2, 3, 224, 224),
        "frames_per_visual": [2],
        "labels": torch.where(torch.arange(60) >= 50, ids, -100),
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    before = model(**step).loss
    before.backward()
    optimizer.step()
    with torch.no_grad():
        assert model(**step).loss < before
