import pytest

from inference.scoring import (
    caption_facts,
    exact_match,
    find_facts,
    format_table,
    score_turn,
    summarise,
)


@pytest.mark.parametrize(
    "prediction, answer, same",
    [
        ("Left.", "left", True),
        ("  it moves   left ", "It moves left.", True),
        ("向左移动。", "向左移动", True),
        ("３个", "3个", True),  # full-width digits
        ("向 左", "向左", True),
        ("先向左,再向上", "先向左,再向上。", True),
        ("a star", "the star", False),
        ("left", "right", False),
        ("3.5", "35", False),
        ("", "left", False),
        ("two red", "twored", False),
    ],
)
def test_words_and_numbers_count_case_space_and_punctuation_do_not(prediction, answer, same):
    assert exact_match(prediction, answer) is same


def test_facts_are_whole_words_and_the_longest_of_overlapping_ones():
    vocabulary = ["ring", "left", "moves left", "red", "红色", "红色圆环", "向左"]
    found = find_facts("A spring, a RED ring moves left.", vocabulary)
    assert found == ["red", "ring", "moves left"]
    assert find_facts("红色圆环向左移动", vocabulary) == ["红色圆环", "向左"]
    assert find_facts("nothing of it", vocabulary) == []
    assert find_facts("anything", []) == []


WORDS = ["red", "star", "left", "right", "grows"]


@pytest.mark.parametrize(
    "caption, score",
    [
        ("A red star moves left, then right.", 1),
        ("A red star moves right, then left.", 3 / 4),  # order
        ("A red star moves left.", 3 / 4),  # omission
        ("A red star moves left, then right, then grows.", 4 / 5),  # invention
        ("Nothing.", 0),
    ],
)
def test_a_caption_pays_for_order_omission_and_invention(caption, score):
    facts = ["red", "star", "left", "right"]
    assert caption_facts(caption, facts, WORDS) == pytest.approx(score)


def record(kind, answer, prediction, language="en", pair=None):
    return score_turn({"type": kind, "pair": pair}, language, prediction, answer, {})


def test_a_pair_is_right_when_both_directions_are():
    turns = [("left", "left", "a"), ("right", "right", "a"), ("left", "left", "b")]
    turns += [("right", "left", "b"), ("up", "up", "alone")]  # its other half was not asked
    records = [record("direction", *said, pair=pair) for *said, pair in turns]
    summary = summarise(records)
    assert summary["reversed"] == 1 / 2 and summary["counts"]["pairs"] == 2
    assert summary["all"] == 4 / 5


def test_captions_stand_apart_and_groups_are_means():
    vocabulary = {"en": {"red", "star", "cup"}}
    caption = {"type": "caption", "facts": ["red", "star"]}
    records = [
        score_turn(caption, "en", "A red cup.", "A red star.", vocabulary),
        record("count", "three", "three"),
        record("count", "four", "three"),
        record("count", "三个", "三个", language="zh"),
    ]
    summary = summarise(records)
    assert summary["captions"] == 1 / 2
    assert summary["all"] == pytest.approx(2 / 3)
    assert summary["by_type"] == {"count": pytest.approx(2 / 3)}
    assert summary["by_language"] == {"en": 1 / 2, "zh": 1}


def test_the_majority_answer_is_counted_by_type_and_language():
    records = [record("direction", answer, "") for answer in ("left", "Left.", "right")]
    records += [record("direction", answer, "", "zh") for answer in ("左", "右")]
    records += [record("object", "a cup", "")]
    majority = summarise(records)["majority"]
    assert majority["all"] == (2 + 1 + 1) / 6
    assert majority["by_type"] == {"direction": 3 / 5, "object": 1}
    # Counts of three and four share one guess: the type tells the answer, but not to the asked.
    records = [record(f"count_{n}", n, n) for n in ("3", "3", "4")]
    majority = summarise(records)["majority"]
    assert majority == {"all": 2 / 3, "by_type": {"count_3": 1, "count_4": 0}}


def test_the_table_has_a_column_for_each_control():
    right, wrong = [[record("order", "a cup", said)] for said in ("a cup", "a key")]
    table = format_table({"normal": summarise(right), "reversed": summarise(wrong)})
    row = next(line for line in table.splitlines() if "order" in line)
    assert row.split() == ["order", "1", "100.0", "100.0", "0.0"]
    nothing = summarise([])  # None, and not zero
    assert nothing["all"] is nothing["reversed"] is nothing["captions"] is None
    assert "-" in format_table({"normal": nothing})
