"""Training from videos and training from their features see the same batches."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

import extract_features
from dataset.feature_store import FeatureStore
from dataset.sampler import LengthGroupedBatchSampler
from dataset.samples import read_samples
from dataset.video import FrameTransform
from dataset.video_dataset import (
    VideoDataset,
    VideoSource,
    collate,
)
from model.vision_tower import VisionTower
from tests.clips import make_numbered_clip

# Videos of several lengths, images, both in one sample, text alone, one visual asked about twice,
# one played backwards, and one that can't be read.
SAMPLES = [
    {"video": "long.mp4", "question": "<video>\nWhat happens?"},
    {"video": "long.mp4", "question": "<video>\nWhat happens?", "reverse": True},
    {"video": "long.mp4", "question": "<video>\nWho is there?"},
    {"video": "short.mp4", "question": "What is this?\n<video>"},
    {"image": "a.png", "question": "<image>\nWhat is it?"},
    {"image": "a.png, b.png", "question": "<image><image>\nWhich one is larger?"},
    {"video": ["short.mp4", "b.png"], "question": "<video> and <image>: what do they share?"},
    {"question": "Who are you?"},
    {"video": "broken.mp4", "question": "<video>\nWhat happens?"},
]


@pytest.fixture(scope="module")
def sources(tmp_path_factory, tiny_tower) -> dict[str, VideoSource | FeatureStore]:
    """Where the visuals of data.jsonl, which lies under the first one's root, come from."""
    root = tmp_path_factory.mktemp("data")
    make_numbered_clip(root / "long.mp4", 20, size=(128, 160), noise=150)
    make_numbered_clip(root / "short.mp4", 3, size=(128, 160), noise=100)
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        Image.fromarray(rng.integers(0, 256, (150, 130, 3), np.uint8)).save(root / name)
    (root / "broken.mp4").write_bytes(b"not a video")
    lines = []
    for number, sample in enumerate(SAMPLES):
        turns = [{"role": "user", "content": sample["question"]}]
        turns += [{"role": "assistant", "content": f"Answer {number}."}]
        lines.append(json.dumps(sample | {"id": str(number), "conversations": turns}))
    (root / "data.jsonl").write_text("\n".join(lines))
    features = root / "features"
    extract_features.main(
        [f"--data_path={root}/data.jsonl", f"--images_path={root}", f"--vision_path={tiny_tower}"]
        + [f"--features_path={features}", "--num_workers=0", "--dtype=float32"]
    )
    return {
        "videos": VideoSource(str(root), FrameTransform.from_pretrained(tiny_tower).resize_frames),
        "features": FeatureStore(features),
    }


@pytest.mark.parametrize("share_prefix", [False, True])
def test_videos_and_features_give_the_same_batches(sources, tiny_tower, share_prefix):
    samples = read_samples(Path(sources["videos"].root, "data.jsonl"))
    tokenizer = AutoTokenizer.from_pretrained(Path(__file__).parents[1] / "model/text_tokenizer")
    tower = VisionTower.from_pretrained(tiny_tower)
    tower.normalize = FrameTransform.from_pretrained(tiny_tower).normalize

    def batches(source, batch_size) -> list[dict]:
        dataset = VideoDataset(samples, tokenizer, source, lambda n: 50, share_prefix=share_prefix)
        sampler = LengthGroupedBatchSampler(dataset.lengths, batch_size, seed=3)
        return [collate([dataset[i] for i in batch], pad_id=0) for batch in sampler]

    for batch_size in (2, len(SAMPLES)):  # the second: all kinds in one batch
        raw, made = [batches(source, batch_size) for source in sources.values()]
        for one, other in zip(raw, made, strict=True):
            ours, theirs = one["inputs"], other["inputs"]
            pixels, features = ours.pop("pixel_values", None), theirs.pop("visual_features", None)
            assert (pixels is None) == (features is None)
            if pixels is not None:
                assert pixels.dtype == torch.uint8
                torch.testing.assert_close(tower(pixels).half(), features, atol=2e-3, rtol=2e-3)
            assert ours.keys() == theirs.keys()
            assert str(ours.pop("packed")) == str(theirs.pop("packed"))
            assert all(torch.equal(*map(torch.as_tensor, (ours[k], theirs[k]))) for k in ours)
            assert [bad["id"] for bad in one["bad"]] == [bad["id"] for bad in other["bad"]]
            for count in ("sample_ids", "supervised_tokens", "real_tokens", "padded_tokens"):
                assert one[count] == other[count]
    (whole,) = raw
    assert sorted(whole["sample_ids"]) == [str(i) for i in range(8)]
    assert [bad["id"] for bad in whole["bad"]] == ["8"]
    assert set(whole["inputs"]["frames_per_visual"]) == {8, 3, 1}
