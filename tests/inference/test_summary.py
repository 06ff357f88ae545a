"""Scores, floors and intervals against values known by construction, and the figures of published
scorers on the same 200 made answers.

Theirs were run as they stand at Vinoground/Vinoground 1543a2a, lscpku/VITATECS 58bff59,
MME-Benchmarks/Video-MME 4e7566d, jiyanggao/TALL 3df6794, JUNJIE99/MLVU fd060c1,
daniel-cores/tvbench c354322, OpenGVLab/Ask-Anything 4dd8210, llyx97/TempCompass e1b4631,
EvolvingLMMs-Lab/lmms-eval 75571cf (LongVideoBench, EgoSchema, mean IoU) and pycocoevalcap 1.2 with
its Java tokenizer (VATEX). Where they err, docs/benchmarks.md says how.
"""

import json
import random

import numpy as np
import pytest

from inference.metrics import (
    best_option,
    caption_tokens,
    cider,
    estimate,
    interval_iou,
    parse_letter,
    token_f1,
    two_by_two,
)
from inference.summary import read_results, summarise_answers


def answer(number: int, scoring: dict, **more) -> dict:
    """A line of an answers' file."""
    scoring = {"benchmark": "b", "type": "t", **scoring}
    turn = {"question": "?", "answer": "x", "scoring": scoring, "answers": {}, "logprobs": {}}
    if "options" in scoring:
        equal = [0.0] * len(scoring["options"])
        turn |= {"logprobs": {"normal": equal}, "tokens": [1] * len(equal)}
    about = {"id": f"{number}", "where": "", "visuals": [f"{number}.mp4"], "language": "en"}
    return about | {"missing": "", "turns": [turn | more]}


def letters(form: str) -> list[dict]:
    """Half of the letters are right, the others chosen at random."""
    rng, lines = random.Random(form), []
    for number in range(200):
        texts = [f"thing {rng.randrange(100)} {place}" for place in range(4)]
        right = rng.randrange(4)
        said = right if rng.random() < 0.5 else rng.randrange(4)
        letter = form.format(letter="ABCD"[said], text=texts[said])
        scoring = {"metric": "choice", "options": texts, "right": right}
        lines.append(answer(number, scoring, letter=letter))
    return lines


def likelihoods(kind: str) -> list[dict]:
    """kind: pairs: Vinoground's; five: EgoSchema's; ties: VITATECS's, of which a tenth is equal."""
    rng, lines = random.Random(kind), []
    for number in range(200):
        count = 5 if kind == "five" else 2
        right = number % 2 if kind == "pairs" else rng.randrange(count)
        values = [rng.gauss(place == right, 1) for place in range(count)]
        if kind == "ties" and rng.random() < 0.1:
            values = [values[0]] * 2
        scoring = {"metric": "choice", "options": list("abcde"[:count]), "right": right}
        scoring |= {"group": f"{number // 2}"} if kind == "pairs" else {}
        lines.append(answer(number, scoring, logprobs={"normal": values}))
    return lines


def spans() -> list[dict]:
    rng, lines = random.Random(0), []
    for number in range(200):
        start, length = rng.randrange(200), rng.randrange(10, 120)  # tenths of a second
        times = sorted(max(0, at + round(rng.gauss(0, 30))) / 10 for at in (start, start + length))
        scoring = {"metric": "span", "seconds": [start / 10, (start + length) / 10]}
        text = f"The event happens in the {times[0]} - {times[1]} seconds."
        lines.append(answer(number, scoring, answers={"normal": text}))
    return lines


def captions() -> list[dict]:
    rng = random.Random(0)
    parts = ("A man,The girl's dog,Two kids", "isn't hitting,plays,holds up", "a ball,it,3.5 kg")

    def caption() -> str:
        words = " ".join(rng.choice(choices.split(",")) for choices in parts)
        return words + rng.choice([".", "!", ""])

    lines = []
    for number in range(200):
        scoring = {"metric": "cider", "references": [caption() for _ in range(10)]}
        lines.append(answer(number, scoring, answers={"normal": caption()}))
    return lines


@pytest.fixture
def rows(tmp_path):
    """The table of answers to a benchmark's questions."""

    def rows(lines: list[dict]) -> dict[str, dict]:
        path = tmp_path / "answers.jsonl"
        path.write_text("\n".join(map(json.dumps, [{}, *lines])) + "\n")
        return summarise_answers(read_results(path))["benchmarks"]["b"]["rows"]

    return rows


@pytest.mark.parametrize(
    ("lines", "figures"),
    [
        (letters("{letter}"), {"generated letter": 0.66}),
        (letters("({letter}) {text}"), {"generated letter": 0.66}),
        (letters("{letter}. {text}"), {"generated letter": 0.66}),
        (likelihoods("pairs"), {"text": 0.6, "video": 0.58, "group": 0.52}),
        (likelihoods("five"), {"likelihood": 0.485}),
        (likelihoods("ties"), {"likelihood": 0.69}),
        (spans(), {"R1@0.3": 0.69, "R1@0.5": 0.465, "R1@0.7": 0.2, "mean IoU": 0.4514638103468986}),
        (captions(), {"CIDEr": 1.41809153275019}),
    ],
)
def test_the_same_answers_get_the_published_scorers_figures(rows, lines, figures):
    found = rows(lines)
    assert {name: found[name]["score"] for name in figures} == pytest.approx(figures, abs=1e-9)


def choice(number: int, options: list[str], right: int) -> dict:
    """A question about video number // 4."""
    line = answer(number, {"metric": "choice", "options": options, "right": right})
    return line | {"visuals": [f"{number // 4}.mp4"]}


def test_floors_of_a_set_whose_floors_are_known(rows):
    """Answers "always" are right wherever they stand, "never" nowhere; letter B is right in 60 %;
    the longest option is right in 20 %."""
    rng, lines = random.Random(0), []
    for number in range(1000):
        right = 1 if number % 10 < 6 else rng.choice([0, 2, 3])
        texts = [f"option {number} {place}" for place in range(4)]
        texts[right if number % 5 == 0 else (right + 1) % 4] += " which is longer"
        lines.append(choice(number, texts, right))
    # No text comes twice: the table knows nothing.
    known = {"chance": 0.25, "fixed letter": 0.6, "longest option": 0.2, "answer table": 0.25}
    assert rows(lines)["likelihood"]["floors"] == pytest.approx(known, abs=0.001)
    for entry in (line["turns"][0]["scoring"] for line in lines):
        entry["options"][entry["right"]] = "always"
        entry["options"][(entry["right"] + 2) % 4] = "never"
    assert rows(lines)["likelihood"]["floors"]["answer table"] == 1
    # Equals: the expectation; and each video has an answer of its own, which other videos don't.
    lines = [choice(i, [f"of video {i // 4}", f"not video {i // 4}"], 0) for i in range(400)]
    floors = {"chance": 0.5, "fixed letter": 1, "longest option": 0, "answer table": 0.5}
    assert rows(lines)["likelihood"]["floors"] == floors
    equal = [choice(0, ["a", "b"], 0), choice(4, ["a", "b", "c", "d"], 1)]
    floors = rows(equal)["likelihood"]["floors"]
    assert floors["chance"] == floors["longest option"] == 0.375
    match = [answer(i, {"metric": "match"}) | {"id": f"{i}"} for i in range(4)]
    match[0]["turns"][0]["answer"] = "another"
    match[1]["turns"][0]["answers"] = {"normal": "x"}
    row = rows(match)["exact match"]
    assert row["score"] == 0.25 and row["floors"] == {"most frequent": 0.75}


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
    assert parse_letter(text, "1234") == place


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
        covered += interval["low"] <= accuracy <= interval["high"]
        unclustered = estimate(scores, range(len(scores)))
        naive += unclustered["low"] <= accuracy <= unclustered["high"]
    assert 920 <= covered <= 970
    assert naive < 800  # what is lost by taking the questions of a video for independent


def test_an_interval_stays_within_bounds_and_never_claims_certainty():
    sure = estimate([1.0] * 40, range(40))
    assert sure["score"] == 1 == pytest.approx(sure["high"]) and 0.85 < sure["low"] < 0.95
    assert estimate([1.0] * 40, [0] * 40)["low"] < 0.1  # one video
    with pytest.raises(ValueError, match="no scores"):
        estimate([], [])


def test_a_planted_difference_is_found_and_none_where_there_is_none():
    """2 points of 2,000 questions, where two runs also differ by luck on 3 %, as two seeds do."""
    rng, found, false_alarms = np.random.default_rng(2), 0, 0
    for _ in range(200):
        base, videos = (column[:2000] for column in simulate(rng, videos=400))
        better = base.copy()
        better[rng.choice(np.flatnonzero(base == 0), 40, replace=False)] = 1
        ours, theirs = rng.permutation(2000)[:60].reshape(2, 30)
        luck = base.copy()
        luck[theirs] = 1 - luck[theirs]
        for run in (better, base):
            run[ours] = 1 - run[ours]
        found += estimate(better - luck, videos, bounded=False)["low"] > 0
        nothing = estimate(base - luck, videos, bounded=False)
        false_alarms += not nothing["low"] <= 0 <= nothing["high"]
    assert found >= 190 and false_alarms <= 20
