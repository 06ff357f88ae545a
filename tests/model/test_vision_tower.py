"""The vision towers, and the two named sizes with a full-size one."""

import json
import os

import numpy as np
import pytest
import torch
import transformers
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel

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


# name: family, side, patch, then tokens a frame; widths and depths are tiny
SHAPES = {
    "CLIP ViT-B/32": ("CLIP", 224, 32, 50),
    "CLIP ViT-B/16": ("CLIP", 224, 16, 197),
    "CLIP ViT-L/14": ("CLIP", 224, 14, 257),
    "CLIP ViT-L/14-336": ("CLIP", 336, 14, 577),
    "SigLIP B/16": ("Siglip", 224, 16, 196),  # SigLIP2's models of one size are of this class too
    "SigLIP So400m/14": ("Siglip", 384, 14, 729),
    "SigLIP2 B/16 NaFlex": ("Siglip2", 256, 16, 256),
}


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "vision half"])
@pytest.mark.parametrize("name", SHAPES)
def test_every_tower_gives_what_a_hook_on_its_encoder_sees(name, whole, tmp_path):
    family, side, patch, tokens = SHAPES[name]
    torch.manual_seed(0)
    text = {"hidden_size": 24, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 50}
    text |= {"num_attention_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
    size = {"num_patches": tokens} if family == "Siglip2" else {"image_size": side}
    vision = TINY | {"image_size": 0, "patch_size": patch, "hidden_size": 24} | size
    if family == "Siglip2":
        del vision["image_size"]
    config = getattr(transformers, f"{family}Config")(text_config=text, vision_config=vision)
    model = getattr(transformers, f"{family}Model")(config).eval()
    torch.nn.init.normal_(model.vision_model.post_layernorm.weight)  # would show if it were passed
    (model if whole else model.vision_model).save_pretrained(tmp_path)

    tower, pixels = VisionTower.from_pretrained(tmp_path), torch.randn(2, 3, side, side)
    seen, inputs = [], {"pixel_values": pixels}
    if family == "Siglip2":  # its own processor cuts the frames into patches
        tiles = pixels.view(2, 3, 16, patch, 16, patch).permute(0, 2, 4, 3, 5, 1)
        inputs = {"pixel_values": tiles.reshape(2, tokens, -1)}
        inputs["pixel_attention_mask"] = torch.ones(2, tokens, dtype=torch.long)
        inputs["spatial_shapes"] = torch.tensor([[16, 16]] * 2)
    model.vision_model.encoder.register_forward_hook(lambda *call: seen.append(call[2][0]))
    with torch.no_grad():
        model.vision_model(**inputs)

    features = tower(pixels)
    assert features.shape == (2, tower.tokens_per_frame, tower.hidden_size) == (2, tokens, 24)
    assert tower.image_size == side
    torch.testing.assert_close(features, seen[0], atol=1e-6, rtol=0)


PROCESSORS = {  # of transformers, and what they say: side, resize
    "CLIPImageProcessor": ({"size": {"shortest_edge": 336}, "crop_size": 336}, 336, "crop"),
    "SiglipImageProcessor": ({"size": {"height": 384, "width": 384}}, 384, "squash"),
    "Siglip2ImageProcessor": ({"patch_size": 16, "max_num_patches": 256}, 256, "squash"),
}


@pytest.mark.parametrize("nested", [False, True], ids=["image processor", "whole processor"])
@pytest.mark.parametrize("name", PROCESSORS)
def test_size_and_normalisation_come_from_the_directory(name, nested, tmp_path):
    settings, side, resize = PROCESSORS[name]
    processor = getattr(transformers, name)(**settings, image_mean=[0.1, 0.2, 0.3])
    processor.save_pretrained(tmp_path)
    if nested:  # as a CLIPProcessor with its tokenizer saves it
        alone = tmp_path / "preprocessor_config.json"
        text = json.dumps({"image_processor": json.loads(alone.read_text())})
        alone.unlink()
        (tmp_path / "processor_config.json").write_text(text)
    transform = FrameTransform.from_pretrained(tmp_path)
    assert (transform.image_size, transform.resize) == (side, resize)
    assert transform.mean == (0.1, 0.2, 0.3) and transform.std == tuple(processor.image_std)
    frames = np.random.default_rng(0).integers(0, 256, (2, side, side, 3), np.uint8)
    theirs = processor(list(frames), return_tensors="pt")["pixel_values"]
    if name == "Siglip2ImageProcessor":
        theirs = theirs.view(2, 16, 16, 16, 16, 3).permute(0, 5, 1, 3, 2, 4).reshape(2, 3, 256, 256)
    torch.testing.assert_close(transform(frames), theirs, atol=1e-5, rtol=0)


def test_a_siglip_tower_goes_through_the_whole_model():
    """No CLS: the placeholder has one token a place, and pixels still change the answer."""
    torch.manual_seed(0)
    tower = VisionTower(transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**TINY)))
    config = CinegoConfig(LanguageModelConfig(64, 32, 2, 4), "dct", 32, tower.tokens_per_frame)
    assert config.tokens_per_visual(5) == 16
    model = Cinego(config, tower).eval()
    inputs = {
        "input_ids": torch.randint(0, 64, (1, 20)),
        "visual_mask": torch.arange(20)[None] < 16,
        "frames_per_visual": [5],
    }
    pixels = torch.randn(5, 3, 32, 32)
    forward = model(**inputs, pixel_values=pixels).logits
    backward = model(**inputs, pixel_values=pixels.flip(0)).logits
    assert (forward - backward).abs().max() > 1e-4


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


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def test_a_missing_or_broken_tower_says_what_to_put_there(clip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"no vision tower in .*nowhere(.|\n)*hf download"):
        VisionTower.from_pretrained(tmp_path / "nowhere")
    clip.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="can't read the weights"):
        VisionTower.from_pretrained(tmp_path)
    os.remove(weights)
    torch.save({"x": Malicious()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="can't read the weights"):
        VisionTower.from_pretrained(tmp_path)
    assert not (tmp_path / "pwned").exists()
    os.remove(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="can't read the weights"):
        VisionTower.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="'bert' model, not CLIP or SigLIP"):
        VisionTower.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="config.json names no model_type"):
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
    config = CinegoConfig(LanguageModelConfig(64, 32, 2, 4), "dct", 32, 17)
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
