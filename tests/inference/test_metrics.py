"""Scores, intervals and floors against values that are known by construction."""

import random

import numpy as np
import pytest

from inference import floors
from inference.metrics import (
    best_option,
    caption_tokens,
    cider,
    compare,
    estimate,
    interval_iou,
    parse_letter,
    token_f1,
    two_by_two,
)

# ------------------------------------------------------------------------------------ one answer


@pytest.mark.parametrize(
    ("text", "place"),
    [
        *(("B", 1), ("(b)", 1), ("B. because", 1), ("B) it", 1), (" c ", 2), ("Answer: C", 2)),
        *(("The best answer is (A).", 0), ("Option D", 3)),
        *(("", None), ("(", None), (")", None), ("A man walks", None), ("Because", None)),
        *(("E", None), ("一个男人", None), ("I don't know", None)),
    ],
)
def test_a_letter_counts_only_where_it_stands_by_itself(text, place):
    assert parse_letter(text, 4) == place


def test_token_f1():
    assert token_f1("A red car.", "a red car") == 1
    assert token_f1("the red car", "a red car") == pytest.approx(2 / 3)
    assert token_f1("红色汽车", "红汽车") == pytest.approx(6 / 7)
    assert token_f1("", "x") == token_f1("y", "x") == 0


@pytest.mark.parametrize(
    ("text", "iou"),
    [
        *(("24.3 - 30.4", 1), ("from 30.4 to 24.3 seconds", 1), ("0:24.3 to 0:30.4", 1)),
        *(("20.3 - 30.4", 6.1 / 10.1), ("40 - 50", 0), ("24.3", 0), ("at the start", 0), ("", 0)),
    ],
)
def test_interval_iou(text, iou):
    assert interval_iou(text, [24.3, 30.4]) == pytest.approx(iou)


def test_caption_tokens_are_those_of_the_ptb_tokenizer():
    assert caption_tokens("It's a man's hat, isn't it?") == "it 's a man 's hat is n't it"
    assert caption_tokens('A "well-known" chef sautés 3.5 kg.') == "a well-known chef sautés 3.5 kg"
    assert caption_tokens("一个男人在看书。") == "一 个 男 人 在 看 书"


def test_cider_of_chinese_counts_characters_not_full_stops():
    references = [["一只猫在睡觉"], ["a dog runs"], ["a cat sleeps"]]
    assert cider(["一只猫在睡觉。", "x", "y"], references)[0] == pytest.approx(10)


# -------------------------------------------------------------------------- likelihoods and groups


def test_the_three_rules_of_likelihood_can_differ():
    best = best_option([-4, -6, -5], tokens=[2, 6, 2], blank=[-4, -6, -9])
    assert best == {"likelihood": 0, "likelihood a token": 1, "likelihood - blank": 2}
    assert best_option([-4, -4], [1, 2]) == {"likelihood": -1, "likelihood a token": 1}


def test_two_by_two_needs_each_preference():
    assert two_by_two([-1, -2], [-2, -1]) == {"text": 1, "video": 1, "group": 1}
    assert two_by_two([-1, -2], [-3, -2.5]) == {"text": 1, "video": 0, "group": 0}
    assert two_by_two([-1, -1], [-1, -1]) == {"text": 0, "video": 0, "group": 0}
    rng = np.random.default_rng(0)  # the chances that its authors name
    by_chance = [two_by_two(*rng.normal(size=(2, 2))) for _ in range(6000)]
    for name, expected in {"text": 0.25, "video": 0.25, "group": 1 / 6}.items():
        assert np.mean([each[name] for each in by_chance]) == pytest.approx(expected, abs=0.02)


# --------------------------------------------------------------------------------------- certainty


def simulate(rng, videos: int = 100, accuracy: float = 0.4) -> tuple[np.ndarray, np.ndarray]:
    """Questions about videos that are easy or hard as a whole, of unlike numbers a video."""
    counts = rng.integers(1, 12, videos)
    easy = rng.beta(accuracy, 1 - accuracy, videos)
    videos = np.repeat(np.arange(videos), counts)
    return (rng.random(len(videos)) < easy[videos]).astype(float), videos


@pytest.mark.parametrize("accuracy", [0.4, 0.95])
def test_intervals_cover_the_truth_as_often_as_they_say(accuracy):
    rng, covered, naive = np.random.default_rng(1), 0, 0
    for _ in range(1000):
        scores, videos = simulate(rng, accuracy=accuracy)
        interval = estimate(scores, videos)
        covered += interval.low <= accuracy <= interval.high
        unclustered = estimate(scores, range(len(scores)))
        naive += unclustered.low <= accuracy <= unclustered.high
    assert 920 <= covered <= 970
    assert naive < 800  # what is lost by taking the questions of a video for independent


def test_an_interval_stays_within_bounds_and_never_claims_certainty():
    sure = estimate([1.0] * 40, range(40))
    assert sure.score == 1 == pytest.approx(sure.high) and 0.85 < sure.low < 0.95
    assert estimate([1.0] * 40, [0] * 40).low < 0.1  # one video
    with pytest.raises(ValueError, match="no scores"):
        estimate([], [])


def test_a_planted_difference_is_found_and_none_where_there_is_none():
    rng, found, false_alarms = np.random.default_rng(2), 0, 0
    for _ in range(200):
        base, videos = simulate(rng, videos=400)
        base, videos = base[:2000], videos[:2000]
        wrong = np.flatnonzero(base == 0)
        better = base.copy()
        better[rng.choice(wrong, 40, replace=False)] = 1  # 2 points of 2,000 questions
        # Both runs also differ by luck on 3 % of the questions, as two seeds do.
        flips = rng.permutation(2000)[:60]
        luck, other = base.copy(), better.copy()
        luck[flips[:30]], other[flips[30:]] = 1 - luck[flips[:30]], 1 - other[flips[30:]]
        same = base.copy()
        same[flips[30:]] = 1 - same[flips[30:]]
        found += compare(other, luck, videos).low > 0
        nothing = compare(same, luck, videos)
        false_alarms += not nothing.low <= 0 <= nothing.high
    assert found >= 190 and false_alarms <= 20


# ------------------------------------------------------------------------------------------ floors


def test_floors_of_a_set_whose_floors_are_known():
    """Answers "always" are right wherever they stand, "never" nowhere; letter B is right in 60 %;
    the longest option is right in 20 %."""
    rng, options, rights = random.Random(0), [], []
    for number in range(1000):
        right = 1 if number % 10 < 6 else rng.choice([0, 2, 3])
        texts = [f"option {number} {place}" for place in range(4)]
        if number % 5 == 0:
            texts[right] += " which is longer"
        else:
            texts[(right + 1) % 4] += " which is longer"
        options.append(texts)
        rights.append(right)
    videos = [number // 4 for number in range(1000)]
    assert floors.chance(options) == 0.25
    assert floors.chance([["a", "b"], ["a", "b", "c", "d"]]) == 0.375
    assert floors.fixed_letter(rights) == pytest.approx(0.6, abs=0.001)
    assert floors.longest_option(options, rights) == 0.2
    assert floors.longest_option([["a", "b"]] * 3, [0, 1, 1]) == 0.5  # equals: the expectation
    # No text comes twice: the table knows nothing.
    assert floors.answer_table(options, rights, videos) == pytest.approx(0.25)
    for texts, right in zip(options, rights, strict=True):
        texts[right] = "always"
        texts[(right + 2) % 4] = "never"
    assert floors.answer_table(options, rights, videos) == 1


def test_the_answer_table_never_sees_the_video_that_it_answers():
    """Each video has an answer of its own, right four times: known within the video only."""
    videos = [number // 4 for number in range(400)]
    options = [[f"of video {video}", f"wrong {video}"] for video in videos]
    assert floors.answer_table(options, [0] * 400, videos) == 0.5


def test_the_prefix_table_of_short_answers():
    questions = ["what is the colour of it"] * 500 + ["how many are there now"] * 500
    answers = ["red"] * 400 + ["blue"] * 100 + ["two"] * 300 + ["three"] * 200
    assert floors.prefix_table(questions, answers, range(1000)) == pytest.approx(0.7)
    seen_before = floors.prefix_table(["what is", "what was it", "who"], ["x", "x", "y"], range(3))
    assert seen_before == pytest.approx(2 / 3, abs=0.4)  # shorter starts where the whole is new
