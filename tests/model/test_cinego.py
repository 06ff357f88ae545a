"""Cinego: visuals stand exactly at their placeholders, whatever else is in the batch."""

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from model.cinego import Cinego, find_placeholders
from model.config import CinegoConfig, LanguageModelConfig

P, D, VOCABULARY = 6, 16, 64
PLACEHOLDER = [30, 30, 30, 32, 32, 32]


def make(summary="dct", image_ids=None, **language_model):
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 4, "initializer_range": 0.2, "embedding_std": 0.5}
    config = LanguageModelConfig(VOCABULARY, 32, 2, **sizes | language_model)
    return Cinego(CinegoConfig(config, summary, D, P, image_ids=image_ids)).eval()


def sample(model, *parts):
    """A row from text (a number of random ids) and visuals (a list with the number of frames)."""
    ids, mask, frames = [], [], []
    for part in parts:
        if isinstance(part, int):
            ids += torch.randint(33, VOCABULARY, (part,)).tolist()
            mask += [False] * part
        else:
            tokens = model.config.tokens_per_visual(part[0])
            ids += PLACEHOLDER[:1] * (tokens // 2) + PLACEHOLDER[-1:] * (tokens - tokens // 2)
            mask += [True] * tokens
            frames += part
    visuals = {"visual_features": torch.randn(sum(frames), P, D), "frames_per_visual": frames}
    return {"input_ids": torch.tensor(ids), "visual_mask": torch.tensor(mask), **visuals}


def batch(*samples):
    """Right padded, with the frames of all rows one after another, as the data path does it."""
    inputs = {
        name: pad_sequence([s[name] for s in samples], batch_first=True)
        for name in ("input_ids", "visual_mask")
    }
    frames = [n for s in samples for n in s["frames_per_visual"]]
    if frames:
        features = torch.cat([s["visual_features"] for s in samples])
        inputs |= {"visual_features": features, "frames_per_visual": frames}
    return inputs


@pytest.mark.parametrize("summary", ["dct", "gpt4video", "mean", "concat"])
def test_a_mixed_batch_equals_each_sample_alone(summary):
    model = make(summary)
    samples = [
        sample(model, 9),  # text only
        sample(model, 2, [1], 7),  # an image
        sample(model, 1, [8], 12),  # a video
        sample(model, 3, [1], 2, [1], 1, [5], 4),  # two images and a short video
        sample(model, [12], 5),  # a video first, and longer
    ]
    together = model(**batch(*samples)).logits
    for row, one in enumerate(samples):
        alone = model(**batch(one)).logits[0]
        torch.testing.assert_close(together[row, : len(alone)], alone, atol=1e-5, rtol=1e-5)


def test_each_visual_stands_in_its_own_place():
    """The rows at the second placeholder are the second visual's, and text rows stay text."""
    model = make()
    one = sample(model, 2, [4], 3, [1], 1)
    embeds = model.embed(**batch(one))[0]
    visuals = model.vision_proj(model.video_summary(one["visual_features"], [4, 1]))
    torch.testing.assert_close(embeds[2 : 2 + P], visuals[0])
    torch.testing.assert_close(embeds[5 + P : 5 + 2 * P], visuals[1])
    text = ~one["visual_mask"]
    torch.testing.assert_close(embeds[text], model.language_model.embed(one["input_ids"])[text])


@pytest.mark.parametrize("summary", ["dct", "gpt4video", "mean", "concat"])
def test_half_precision_by_autocast_or_by_weights_stays_close(summary):
    model = make(summary)
    inputs = batch(sample(model, 1, [8], 5), sample(model, 4, [1], 1))
    full = model(**inputs).logits[:, -1]
    with torch.autocast("cpu", torch.bfloat16):
        autocast = model(**inputs).logits[:, -1].float()
    weights = model.bfloat16()(**inputs).logits[:, -1].float()
    for half in (autocast, weights):
        assert torch.cosine_similarity(half, full, dim=-1).min() > 0.99


def test_placeholders_are_found_by_their_ids_without_a_mask():
    masked, unmasked = make(), make(image_ids=PLACEHOLDER)
    inputs = batch(sample(masked, 2, [3], 4, [1], 1), sample(masked, 5))
    expected = masked(**inputs).logits
    mask = inputs.pop("visual_mask")
    assert torch.equal(find_placeholders(inputs["input_ids"], PLACEHOLDER), mask)
    torch.testing.assert_close(unmasked(**inputs).logits, expected)


def test_one_repeated_id_as_placeholder_gives_whole_runs_only():
    ids = torch.tensor([[7, 34, 34, 34, 34, 34, 34, 34, 9]])  # two placeholders of three, one stray
    found = find_placeholders(ids, [34, 34, 34])
    assert found[0].tolist() == [False] + [True] * 6 + [False] * 2
    assert not find_placeholders(ids[:, :2], [34, 34, 34]).any()


places = torch.arange(12).expand(2, -1)
SHORT = (places > 1) & (places < torch.tensor([[8], [7]]))  # placeholders of 6 and of 5 tokens


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"visual_mask": SHORT}, r"row 1 .* ends after 11 placeholders.*\[6, 12\] tokens"),
        ({"frames_per_visual": [2, 1, 1]}, "has 12 placeholders, but its visuals have 18 tokens"),
        ({"frames_per_visual": [3, 2]}, r"frames_per_visual \[3, 2\].*4 frames"),
        ({"frames_per_visual": [4, 0]}, r"frames_per_visual \[4, 0\].*4 frames"),
        ({"visual_features": None}, r"row 0 .* ends after 6 placeholders.* visuals end after \[\]"),
        ({"visual_features": torch.ones(4, P, 8)}, r"\(6, 8\) a frame, .* model takes \(6, 16\)"),
        ({"visual_mask": None}, "need visual_mask, as the config has no image_ids"),
        ({"pixel_values": torch.ones(4, 3, 8, 8)}, "need a vision tower"),
    ],
)
def test_a_misfit_names_the_row_and_both_numbers(change, reason):
    model = make()
    inputs = batch(sample(model, 2, [3], 4), sample(model, 1, [1], 4))
    with pytest.raises(ValueError, match=reason):
        model(**inputs | change)


def test_freezing_the_language_model_leaves_summary_and_projector():
    model = make()
    inputs = batch(sample(model, 2, [3], 4))
    model.set_trainable(freeze_llm=2)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    learned = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert learned == {"video_summary", "vision_proj"}
    counts = model.parameter_counts()
    assert counts["trainable"] == counts["video_summary"] + counts["vision_proj"]

    model.set_trainable(freeze_llm=0)
    assert model.parameter_counts()["trainable"] == sum(p.numel() for p in model.parameters())
