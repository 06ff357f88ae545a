"""Placeholders, label masks and truncation, with our tokenizer and MiniMind's of 2024 and 2026."""

from itertools import compress, groupby
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from dataset.conversation import (
    IGNORED,
    ConversationError,
    encode,
    normalise_messages,
    placeholder_ids,
    truncate,
)

ROOT = Path(__file__).resolve().parents[2]
PLACEHOLDERS = {  # the ids of "<" and ">"
    "model/text_tokenizer": (30, 32),
    "tests/data/tokenizers/minimind_v1": (30, 32),
    "tests/data/tokenizers/minimind_3": (63, 65),
}
RUN = "<" * 25 + ">" * 25


@pytest.fixture(scope="module", params=PLACEHOLDERS)
def tokenizer(request):
    tokenizer = AutoTokenizer.from_pretrained(ROOT / request.param)
    left, right = PLACEHOLDERS[request.param]
    assert placeholder_ids(tokenizer, 50) == [left] * 25 + [right] * 25
    return tokenizer


@pytest.fixture(scope="module")
def ours():
    return AutoTokenizer.from_pretrained(ROOT / "model/text_tokenizer")


def talk(*turns: str) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]


def supervised_spans(tokenizer, encoded) -> list[str]:
    """Each run of supervised positions, decoded; labels must be the ids at their own places."""
    pairs = zip(encoded.labels, encoded.input_ids, strict=True)
    assert all(label in (IGNORED, token) for label, token in pairs)
    runs = groupby(encoded.labels, lambda label: label != IGNORED)
    return [tokenizer.decode([*run]) for is_supervised, run in runs if is_supervised]


@pytest.mark.parametrize(
    "answers",
    [
        ["它向左移动。", "red"],
        ["A {braced} answer with  two spaces.", "1 < 2 and 2 > 1"],
        ["use the <video> tag", "Two\nlines\n\nand more"],
    ],
)
def test_a_supervised_span_is_the_answer_and_its_end_token(tokenizer, answers):
    messages = talk("<video>\n谁 {x} moves?", answers[0], "And then?", answers[1])
    encoded = encode(tokenizer, messages, [50])
    expected = [answer + tokenizer.eos_token for answer in answers]
    assert supervised_spans(tokenizer, encoded) == expected


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<video>\nWhat moves?", f"{RUN}\nWhat moves?"),
        ("What moves? <video>", f"What moves? {RUN}"),
        (" <video> What?", f" {RUN} What?"),
        ("In<image>this 视频<image>?", f"In{RUN}this 视频{RUN}?"),
        (f"{RUN}\nWhat?", f"{RUN}\nWhat?"),
        (f"a {RUN} b <video>", f"a {RUN} b {RUN}"),
        ("What moves?", f"{RUN}\nWhat moves?"),
        ("No <b>picture</b>", "No <b>picture</b>"),
    ],
)
def test_every_tag_gets_its_placeholder(tokenizer, text, shown):
    visuals = 0 if "No " in text else max(1, shown.count(RUN))
    encoded = encode(tokenizer, talk(text, "ok"), [50] * visuals)
    marked = [i for i, m in zip(encoded.input_ids, encoded.visual_mask, strict=True) if m]
    assert marked == placeholder_ids(tokenizer, 50) * visuals
    assert shown in tokenizer.decode(encoded.input_ids)
    assert {*compress(encoded.labels, encoded.visual_mask)} <= {IGNORED}


def test_visuals_of_different_lengths_and_turns(tokenizer):
    encoded = encode(tokenizer, talk("<image> first", "a cat", "and <video>?", "a dog"), [4, 7])
    runs = "".join("x" if mask else " " for mask in encoded.visual_mask).split()
    assert [len(run) for run in runs] == [4, 7]


def test_what_is_generated_from_is_what_was_trained_on(tokenizer):
    messages = talk("<video>\nWhat?", "A cat.", "Where?", "Left.")
    trained = encode(tokenizer, messages, [50])
    for turns in (1, 3):
        prompt = encode(tokenizer, messages[:turns], [50], add_generation_prompt=True)
        length = len(prompt.input_ids)
        assert trained.input_ids[:length] == prompt.input_ids
        assert trained.labels[length - 1] == IGNORED and trained.labels[length] != IGNORED


def test_the_whole_text_is_the_template_s_own(tokenizer):
    messages = normalise_messages(talk("Who {0}?", "He.", "Why so?", "No idea."))
    for variant in (messages, [{"role": "system", "content": "Be brief."}, *messages]):
        whole = tokenizer.apply_chat_template(variant, tokenize=False)
        assert tokenizer.decode(encode(tokenizer, variant, []).input_ids) == whole


def test_an_answer_with_its_own_reasoning_is_supervised_from_there():
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tests/data/tokenizers/minimind_3")
    answer = "<think>\nIt has whiskers.\n</think>\n\nA cat."
    spans = supervised_spans(tokenizer, encode(tokenizer, talk("What?", answer), []))
    assert spans == ["It has whiskers.\n</think>\n\nA cat.<|im_end|>"]


def test_a_tokenizer_without_angle_brackets_is_refused():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")))
    with pytest.raises(ValueError, match="no single tokens '<' and '>'.*--tokenizer_path"):
        placeholder_ids(words)


@pytest.mark.parametrize(
    ("messages", "visuals", "reason"),
    [
        (talk("<video> <video>", "ok"), 1, "2 visual tags .* for 1 visuals"),
        (talk("<video>", "ok"), 0, "1 visual tags .* for 0 visuals"),
        (talk("What?", "ok"), 2, "0 visual tags .* for 2 visuals"),
        (talk("What?", "  \n"), 0, "turn 2: the answer is empty"),
        (talk("What?"), 0, "last turn must be an assistant's answer"),
        (talk("What?", "ok")[1:], 0, "turn 1: it is assistant's, expected user's"),
        (talk("What?", "ok")[:1] * 2, 0, "turn 2: it is user's, expected assistant's"),
        ([{"from": "alien", "value": "hi"}], 0, "role 'alien' isn't one of"),
        ([{"from": "human", "value": 7}], 0, "must be a string, not 7"),
        ([{"value": "hi"}], 0, "role None"),
        (["hi"], 0, "turn 1: role 'hi' isn't one of"),
        ([], 0, "at least one turn"),
        (talk("\ufdd0", "ok"), 1, "U\\+FDD0"),
        ([{"role": "tool", "content": "x"}], 0, "role 'tool' isn't one of"),
        ([{"role": ["user"] * 999, "content": "x"}], 0, r"role \['user', .*\.\.\.\] isn't"),
        ([{"role": "user", "content": [{"text": "x" * 9999}]}], 0, "turn 1: .* must be a string"),
        ([{"role": "user", "content": float("nan")}], 0, "must be a string, not nan"),
    ],
)
def test_what_cannot_be_encoded_says_why(ours, messages, visuals, reason):
    with pytest.raises(ConversationError, match=reason) as error:
        encode(ours, messages, [50] * visuals)
    assert len(str(error.value)) < 300


def test_truncation_keeps_visuals_whole_and_an_answer_alive(ours):
    encoded = encode(ours, talk("<video>\nWhat?", "one two three", "<image>?", "four"), [50, 10])
    first_answer = encoded.labels.index(next(x for x in encoded.labels if x != IGNORED))
    last_visual = max(i for i, mask in enumerate(encoded.visual_mask) if mask)

    assert truncate(encoded, len(encoded.input_ids)) is encoded
    short = truncate(encoded, len(encoded.input_ids) - 3)
    assert short.input_ids == encoded.input_ids[:-3]
    assert len(short.labels) == len(short.visual_mask) == len(short.input_ids)
    for length in (last_visual, last_visual - 5, first_answer, 30):
        with pytest.raises(ConversationError, match="cuts into a visual, which ends at token"):
            truncate(encoded, length)
    text = encode(ours, talk("What is it about?", "one two"), [])
    with pytest.raises(ConversationError, match="no token of an answer; raise --max_seq_len"):
        truncate(text, 8)


def test_both_styles_of_turns_are_the_same():
    plain = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    # As an Arrow table gives them where a file mixes the styles: each turn has all keys.
    mixed = [{"from": "human", "value": "Hi", "role": None, "content": None}, plain[1]]
    assert normalise_messages(talk("Hi", "Hello")) == normalise_messages(mixed) == plain
