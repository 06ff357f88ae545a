"""The vision towers, and the model that reads them."""

import json
import os

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModel

from dataset.video import FrameTransform
from model.cinego import Cinego
from model.config import CinegoConfig, LanguageModelConfig
from model.vision_tower import VisionTower

TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 4, "image_size": 32, "patch_size": 8}


@pytest.fixture
def clip():
    torch.manual_seed(0)
    return CLIPVisionModel(CLIPVisionConfig(**TINY)).eval()


# name: family, side, patch, then tokens a frame; widths and depths are tiny
SHAPES = {
    "CLIP ViT-B/32": ("CLIP", 224, 32, 50),
    "CLIP ViT-B/16": ("CLIP", 224, 16, 197),
    "CLIP ViT-L/14": ("CLIP", 224, 14, 257),
    "CLIP ViT-L/14-336": ("CLIP", 336, 14, 577),
    "SigLIP B/16": ("Siglip", 224, 16, 196),  # SigLIP2's models of one size are of this class too
    "SigLIP So400m/14": ("Siglip", 384, 14, 729),
}


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "vision half"])
@pytest.mark.parametrize("name", SHAPES)
def test_every_tower_gives_what_a_hook_on_its_encoder_sees(name, whole, tmp_path, capfd):
    family, side, patch, tokens = SHAPES[name]
    torch.manual_seed(0)
    text = {"hidden_size": 24, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 50}
    text |= {"num_attention_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
    vision = TINY | {"image_size": side, "patch_size": patch, "hidden_size": 24}
    config = getattr(transformers, f"{family}Config")(text_config=text, vision_config=vision)
    model = getattr(transformers, f"{family}Model")(config).eval()
    torch.nn.init.normal_(model.vision_model.post_layernorm.weight)  # would show if it were passed
    (model if whole else model.vision_model).save_pretrained(tmp_path)

    capfd.readouterr()
    tower, pixels = VisionTower.from_pretrained(tmp_path), torch.randn(2, 3, side, side)
    assert "UNEXPECTED" not in capfd.readouterr().err  # a text tower is left out on purpose
    seen = []
    model.vision_model.encoder.register_forward_hook(lambda *call: seen.append(call[2][0]))
    with torch.no_grad():
        model.vision_model(pixel_values=pixels)

    features = tower(pixels)
    assert features.shape == (2, tower.tokens_per_frame, tower.hidden_size) == (2, tokens, 24)
    assert tower.image_size == side and not features.requires_grad
    torch.testing.assert_close(features, seen[0], atol=1e-6, rtol=0)


PROCESSORS = {  # of transformers, and what they say: side, resize
    "CLIPImageProcessor": ({"size": {"shortest_edge": 336}, "crop_size": 336}, 336, "crop"),
    "SiglipImageProcessor": ({"size": {"height": 384, "width": 384}}, 384, "squash"),
}


@pytest.mark.parametrize("nested", [False, True], ids=["image processor", "whole processor"])
@pytest.mark.parametrize("name", PROCESSORS)
def test_size_and_normalisation_come_from_the_directory(name, nested, tmp_path):
    settings, side, resize = PROCESSORS[name]
    processor = getattr(transformers, name)(**settings, image_mean=[0.1, 0.2, 0.3])
    processor.save_pretrained(tmp_path)
    if nested:  # as a CLIPProcessor with its tokenizer saves it
        file = (tmp_path / "preprocessor_config.json").rename(tmp_path / "processor_config.json")
        file.write_text(json.dumps({"image_processor": json.loads(file.read_text())}))
    transform = FrameTransform.from_pretrained(tmp_path)
    assert (transform.image_size, transform.resize) == (side, resize)
    assert transform.mean == (0.1, 0.2, 0.3) and transform.std == tuple(processor.image_std)
    frames = np.random.default_rng(0).integers(0, 256, (2, side, side, 3), np.uint8)
    theirs = processor(list(frames), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(transform(frames), theirs, atol=1e-5, rtol=0)


def test_the_fingerprint_is_of_the_weights(clip):
    before = VisionTower(clip).fingerprint()
    assert before == VisionTower(clip).fingerprint()
    clip.encoder.layers[1].mlp.fc1.bias[3] += 1e-3
    assert VisionTower(clip).fingerprint() != before


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def test_a_missing_or_broken_tower_says_what_to_put_there(clip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def refused(reason, directory=tmp_path):
        with pytest.raises(ValueError, match=reason + r"(.|\n)*hf download"):
            VisionTower.from_pretrained(directory)

    refused("no vision tower in .*nowhere", tmp_path / "nowhere")
    clip.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole, state = weights.read_bytes(), load_file(weights)
    del state[next(name for name in state if name.endswith("layers.1.mlp.fc1.weight"))]
    save_file(state, weights, metadata={"format": "pt"})
    refused("lack .*layers.1.mlp.fc1.weight")
    weights.write_bytes(whole[:1000])
    refused("can't read the weights")
    weights.unlink()
    refused("can't read the weights")
    torch.save({"x": Malicious()}, tmp_path / "pytorch_model.bin")
    refused("can't read the weights")
    assert not (tmp_path / "pwned").exists()
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    refused("'bert' model, not CLIP or SigLIP")
    (tmp_path / "config.json").write_text("{}")
    refused("config.json names no model_type")


def test_pixels_and_features_give_the_same_logits_and_the_tower_is_not_saved(clip):
    tower = VisionTower(clip)
    config = CinegoConfig(LanguageModelConfig(64, 32, 2, 4), "dct", 32, 17)
    model, pixels = Cinego(config, tower).eval(), torch.randn(5, 3, 32, 32)
    inputs = {"input_ids": torch.randint(0, 64, (2, 20)), "frames_per_visual": [4, 1]}
    inputs["visual_mask"] = (torch.arange(20) < 17).expand(2, -1)
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
    with pytest.raises(ValueError, match="32 x 32 pixels, not 224 x 224"):
        tower(torch.randn(1, 3, 224, 224))


@pytest.mark.parametrize("width, layers, expected", [(512, 8, 26e6), (768, 16, 104e6)])
def test_the_named_sizes_have_their_numbers_of_parameters(width, layers, expected):
    with torch.device("meta"):
        tower = VisionTower(CLIPVisionModel(CLIPVisionConfig(image_size=224, patch_size=32)))
        config = LanguageModelConfig(hidden_size=width, num_hidden_layers=layers)
        counts = Cinego(CinegoConfig(config), tower).parameter_counts()
    assert counts["language_model"] == pytest.approx(expected, rel=0.05)
    assert counts["vision_tower"] == pytest.approx(87.5e6, rel=0.01)
    assert counts["video_summary"] < 12e6
