"""The demo world: its truth is exact, its splits share no combination, its twins are reversed."""

import hashlib
import json
from pathlib import Path

import av
import numpy as np
import pytest

from demo.language import facts, make_captions, make_questions
from demo.objects import OBJECTS, Object, sprite_of
from demo.scene import SPLITS, Actor, Scene, sample_scene, split_of
from demo.world import (
    FRAME_SIZE,
    NUM_FRAMES,
    make_clip,
    make_split,
    place,
    render,
    write_video,
)

CAR, RED_STAR, UMBRELLA = Object("car"), Object("star", "red"), Object("umbrella")


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def scenes(split: str, number: int = 300) -> list[Scene]:
    rng = np.random.default_rng(1)
    return [sample_scene(rng, split) for _ in range(number)]


def test_there_are_48_objects_and_no_two_look_alike():
    assert len(set(OBJECTS)) == 48
    pictures = {np.asarray(sprite_of(item)).tobytes() for item in OBJECTS}
    assert len(pictures) == 48


def test_no_training_scene_holds_a_held_out_combination():
    trained = {key for scene in scenes("train") for key in scene.combinations()}
    assert {split_of(key) for key in trained} == {"train"}
    for split in ("val", "test"):
        about = {scene.combinations()[0] for scene in scenes(split)}
        assert {split_of(key) for key in about} == {split}
        assert not about & trained


def test_a_number_held_out_for_a_class_is_not_the_total_with_this_class_in_front():
    """Else "two boats and a key" would teach that three with boats in front are never all boats."""
    mixed = 0
    for scene in scenes("train", 1000):
        counts = scene.counts()
        if scene.type == "count" and len(counts) > 1:
            mixed += 1
            for item, number in counts.items():
                if number == max(counts.values()):
                    assert split_of(("count", item, counts.total())) == "train"
    assert mixed > 50


@pytest.mark.parametrize("split", SPLITS)
def test_objects_stay_in_the_picture_and_apart(split):
    rng = np.random.default_rng(3)
    for scene in scenes(split, 40):
        tracks = place(rng, scene)
        for i, a in enumerate(tracks):
            for path in (a.x, a.y):
                assert (path >= a.diameter / 2 - 0.5).all()
                assert (path <= FRAME_SIZE - a.diameter / 2 + 0.5).all()
            for b in tracks[:i]:
                assert (np.hypot(a.x - b.x, a.y - b.y) > (a.diameter + b.diameter) / 2).all()


def ask_all(scene: Scene) -> dict[str, str]:
    """Every question about the scene that may be asked, with its answer."""
    answers = {}
    for seed in range(40):
        rng = np.random.default_rng(seed)
        for _, turns, _ in make_questions(rng, scene, False, "clip") + make_captions(rng, scene):
            answers.update(turns[:1])
    return answers


STAY = ("stay",)
ORDER = Scene("order", (Actor(CAR, ("stay", "left")), Actor(RED_STAR, ("up", "stay"))))
TWO_STEP = Scene("two_step", (Actor(UMBRELLA, ("right", "grow")),))
STARS = Scene("count", (Actor(RED_STAR, STAY), Actor(RED_STAR, STAY)))
MIXED = Scene("count", (*STARS.actors, Actor(CAR, STAY)))


@pytest.mark.parametrize(
    ("scene", "question", "answer"),
    [
        (ORDER, "Describe the video.", "First a red star moves up, then a car moves left."),
        (ORDER, "描述这个视频。", "先是一个红色星星向上移动,然后一个汽车向左移动。"),
        (ORDER, "What moves first?", "the red star"),
        (ORDER, "什么后动?", "汽车"),
        (ORDER, "Which way does the last one move?", "left"),
        (TWO_STEP, "Describe the video.", "An umbrella moves right, then grows."),
        (TWO_STEP, "雨伞做了哪两件事?", "它先向右移动,再变大"),
        (
            TWO_STEP.backwards(),
            "What happens in this video?",
            "An umbrella shrinks, then moves left.",
        ),
        (MIXED, "Describe the video.", "Two red stars and a car stay still."),
        (MIXED, "Count everything.", "three"),
        (STARS, "How many red stars are there?", "two"),
        (STARS, "有几个红色星星?", "两个"),
    ],
)
def test_sentences(scene, question, answer):
    assert ask_all(scene)[question] == answer


def test_facts_are_the_words_that_could_be_wrong():
    english = facts("Two red stars and a car stay still.", "en")
    assert " ".join(english) == "two red stars car stay"
    chinese = facts("先是一个红色星星向上移动,然后一个汽车向左移动。", "zh")
    assert " ".join(chinese) == "红色 星星 向上移动 汽车 向左移动"


@pytest.mark.parametrize(
    "split, seed, sha256", [("train", 0, "9b11caa34e386b3f"), ("test", 777, "5efeb6160267462e")]
)
def test_a_seed_means_the_same_clips_and_words_for_ever(split, seed, sha256, tmp_path):
    """What the READMEs report was measured on them. Pictures may change with Pillow's version."""
    (tmp_path / "clips").mkdir()
    lines = [make_clip(index, split, seed, tmp_path) for index in range(8)]
    assert hashlib.sha256(json.dumps(lines).encode()).hexdigest()[:16] == sha256


def test_a_test_clip_has_a_twin_that_plays_backwards_and_training_plays_clips_both_ways(tmp_path):
    for split in ("train", "test"):
        make_split(split, seed=5, clips=12, out=tmp_path / split, workers=1)
    pairs: dict[str, list[dict]] = {}
    for line in read_lines(tmp_path / "test/questions.jsonl"):
        for entry in line["scoring"]:
            if "pair" in entry:
                pairs.setdefault(entry["pair"], []).append(line)
    assert pairs
    for forward, backward in pairs.values():
        assert forward["conversations"][0] == backward["conversations"][0]
        assert forward["conversations"][1] != backward["conversations"][1]
    forward, backward = (
        [frame.to_ndarray(format="rgb24") for frame in av.open(tmp_path / "test" / file).decode()]
        for file in (forward["video"], backward["video"])
    )
    assert len(forward) == NUM_FRAMES
    for a, b in zip(forward, backward[::-1], strict=True):
        assert np.abs(a.astype(int) - b).mean() < 3  # two encodings of the same picture
    lines = read_lines(tmp_path / "train/questions.jsonl")
    assert {bool(line.get("reverse")) for line in lines} == {False, True}
    assert not any("reversed.mp4" in line["video"] for line in lines)


def test_the_same_frames_are_the_same_file(tmp_path):
    """With x264's usual settings this clip came out in up to four ways."""
    rng = np.random.default_rng([0, 0, 26])
    scene = sample_scene(rng, "train")
    frames = render(rng.spawn(2)[0], scene)
    files = set()
    for number in range(8):
        memory = [np.full(112 * 128 * number + 1000, number, np.uint8) for _ in range(30)]
        del memory  # freed with other contents each time: the encoder gets some of it
        write_video(tmp_path / "clip.mp4", frames)
        files.add((tmp_path / "clip.mp4").read_bytes())
    assert len(files) == 1
