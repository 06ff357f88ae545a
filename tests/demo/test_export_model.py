"""What ships: the small model with the statistics of its training frames, and four clips."""

import pytest
import torch

from demo import figures, train_tower
from demo.export_model import export_model, make_examples
from demo.known_world import warn_unlike_training
from inference.parts import DEMO_MODEL
from model.checkpoint import load_video_language_model, read_about
from model.vision_tower import VisionTower


@pytest.fixture(scope="module")
def exported(tiny_checkpoint, tmp_path_factory):
    """The tiny model as if its training clips had been noise around 1."""
    clips = 1 + torch.randn(40, 4, 50, 32, generator=torch.Generator().manual_seed(0))
    out = tmp_path_factory.mktemp("demo") / "model/small.pth"
    export_model(tiny_checkpoint, list(clips[:30]), list(clips[30:]), out)
    return out


def test_the_exported_model_is_the_same_in_half_the_bytes(exported, tiny_checkpoint):
    assert exported.stat().st_size < 0.6 * tiny_checkpoint.stat().st_size
    assert read_about(exported)["training"]["num_frames"] == 4
    ids, features = torch.arange(40, 60)[None], None
    logits = [
        load_video_language_model(path)(ids, visual_features=features).logits
        for path in (exported, tiny_checkpoint)
    ]
    torch.testing.assert_close(*logits, atol=2e-2, rtol=1e-2)


@pytest.mark.parametrize("mean, warned", [(1.0, False), (1.5, True), (-1.0, True)])
def test_only_frames_unlike_the_training_ones_are_warned_of(exported, mean, warned):
    clip = mean + torch.randn(4, 50, 32, generator=torch.Generator().manual_seed(1))
    assert ("demo world" in (warn_unlike_training(exported, clip.half()) or "")) is warned


def test_a_model_without_statistics_never_warns(tiny_checkpoint):
    assert warn_unlike_training(tiny_checkpoint, torch.full((4, 50, 32), 99.0)) is None


def test_the_examples_in_the_repository_are_those_that_the_command_makes(tmp_path):
    make_examples(tmp_path)
    shipped = DEMO_MODEL.parent.parent / "examples"
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted(path.name for path in shipped.iterdir())
    assert (tmp_path / "questions.jsonl").read_text() == (shipped / "questions.jsonl").read_text()
    assert sum(name.endswith(".mp4") for name in names) == 4


def test_what_ships_is_small_and_says_what_it_knows():
    assert sum(file.stat().st_size for file in DEMO_MODEL.parent.iterdir()) < 5e6
    measured = read_about(DEMO_MODEL)["known_frames"]
    assert "demo world" in measured["note"]
    assert measured["false_alarms"] < 0.01 * measured["held_out_clips"]


def test_the_pictures_of_the_documentation_show_two_answers(tmp_path, capsys):
    figures.main(["--out", str(tmp_path)])
    assert "['the blue triangle', 'the white square']" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["filters.png", "reversed.gif"]


def test_a_tower_is_trained_and_trained_further(tmp_path):
    more = ["--start_from", str(tmp_path / "a"), "--seed", "1"]
    for name, flags in (("a", []), ("b", more)):
        train_tower.main(
            ["--steps", "2", "--batch_size", "4", "--out", str(tmp_path / name), *flags]
        )
        tower = VisionTower.from_pretrained(tmp_path / name)
        assert tower(torch.zeros(2, 3, 112, 112)).shape == (2, 50, 128)
