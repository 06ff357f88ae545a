"""Frames of any size become what the tower was trained on."""

import numpy as np
import pytest
import torch
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from dataset.transforms import FrameTransform

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


@pytest.mark.parametrize("shape", [(90, 160), (160, 90), (61, 61), (33, 200), (48, 48)])
def test_crop_equals_the_clip_processor_of_transformers(shape):
    noise = np.random.default_rng(0).integers(0, 256, (3, *shape, 3), np.uint8)
    sizes = {"size": {"shortest_edge": 48}, "crop_size": 48}
    processor = CLIPImageProcessorPil(**sizes, image_mean=MEAN, image_std=STD)
    expected = processor(list(noise), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(FrameTransform(48, MEAN, STD)(noise), expected, atol=1e-5, rtol=0)


def test_frames_of_the_towers_size_pass_untouched():
    noise = np.random.default_rng(0).integers(0, 256, (2, 48, 48, 3), np.uint8)
    transform = FrameTransform(48, (0, 0, 0), (1, 1, 1))
    assert transform.resize_frames(noise) is noise
    expected = torch.from_numpy(noise).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(transform(noise), expected)


def test_squash_and_pad_keep_the_whole_picture():
    halves = np.zeros((5, 40, 80, 3), np.uint8)
    halves[:, :, 40:] = 255
    squashed = FrameTransform(20, MEAN, STD, resize="squash").resize_frames(halves)
    assert squashed.shape == (5, 20, 20, 3)
    assert squashed[0, :, :7].max() == 0 and squashed[0, :, 13:].min() == 255

    padded = FrameTransform(20, MEAN, STD, resize="pad").resize_frames(halves)
    assert padded.shape == (5, 20, 20, 3)
    bars = np.concatenate([padded[:, :5], padded[:, 15:]], axis=1)
    assert (bars == np.round(np.array(MEAN) * 255)).all()  # near 0 for the tower
    picture = padded[:, 5:15]
    assert picture[:, :, :9].max() == 0 and picture[:, :, 11:].min() == 255
    upright = FrameTransform(20, MEAN, STD, resize="pad").resize_frames(halves.swapaxes(1, 2))
    np.testing.assert_array_equal(upright, padded.swapaxes(1, 2))


@pytest.mark.parametrize("resize", ["crop", "squash", "pad"])
def test_a_line_one_pixel_wide_has_a_size(resize):
    transform = FrameTransform(16, MEAN, STD, resize=resize)
    for shape in ((1, 1), (1, 300), (300, 1)):
        assert transform(np.zeros((2, *shape, 3), np.uint8)).shape == (2, 3, 16, 16)


def test_transform_reads_the_towers_own_configuration(tmp_path):
    file = tmp_path / "preprocessor_config.json"
    statistics = '"image_mean": [0, 0, 0], "image_std": [1, 1, 1]'
    file.write_text('{"size": {"height": 64, "width": 64}, ' + statistics + "}")
    assert FrameTransform.from_pretrained(tmp_path).resize == "squash"
    assert FrameTransform.from_pretrained(tmp_path, resize="pad").resize == "pad"
    for content in ("{", '{"size": 64}', "[]"):
        file.write_text(content)
        with pytest.raises(ValueError, match=r"preprocessor_config\.json"):
            FrameTransform.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="missing"):
        FrameTransform.from_pretrained(tmp_path / "elsewhere")
