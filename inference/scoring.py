"""Scores answers about videos without a judge: exact match, facts of captions, reversed pairs.

Exact match can't be talked into a good mark, and a pair (a clip and the same clip played backwards)
is right only when both answers are: a model that doesn't see time gets none.
"""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence

from dataset.samples import Sample

_CJK = r"[\u3400-\u9fff\uf900-\ufaff]"


def normalise(text: str) -> str:
    """The form in which two answers are compared: width, case, space and punctuation don't count.

    Articles stay, since "a" can be an answer; so does the point of a decimal number. A space beside
    a Chinese character says nothing and goes.
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    text = re.sub(r"(?<=\d)\.(?=\d)", "\0", text)
    text = "".join(" " if unicodedata.category(char).startswith("P") else char for char in text)
    text = " ".join(text.replace("\0", ".").split())
    return re.sub(rf"(?<={_CJK}) | (?={_CJK})", "", text)


def exact_match(prediction: str, answer: str) -> bool:
    return normalise(prediction) == normalise(answer)


def find_facts(text: str, vocabulary: Iterable[str]) -> list[str]:
    """The vocabulary's words in the order of the text; of overlapping words the longest counts."""
    words = sorted({normalise(word) for word in vocabulary} - {""}, key=len, reverse=True)
    if not words:
        return []
    # "ring" must not be found in "spring"; Chinese has no such edges, so only ASCII neighbours bar.
    edge = r"[a-z0-9]"
    pattern = "|".join(rf"(?<!{edge}){re.escape(word)}(?!{edge})" for word in words)
    return re.findall(pattern, normalise(text))


def caption_facts(prediction: str, facts: Sequence[str], vocabulary: Iterable[str]) -> float:
    """How much of a caption is true, 0 to 1: longest common subsequence over the longer sequence.

    Swapped facts (A before B), omitted ones and invented ones all cost.
    """
    found, true = find_facts(prediction, vocabulary), [normalise(fact) for fact in facts]
    if not found and not true:
        return 1.0
    row = [0] * (len(true) + 1)
    for word in found:
        previous = row[:]
        for i, fact in enumerate(true):
            row[i + 1] = previous[i] + 1 if word == fact else max(previous[i + 1], row[i])
    return row[-1] / max(len(found), len(true))


def fact_vocabulary(entries: Iterable[tuple[str, dict]]) -> dict[str, set[str]]:
    """All facts of a test set by language, from (language, scoring entry): what a caption of that
    language could have said, so that a word that isn't true of this clip counts as an invention."""
    vocabulary = defaultdict(set)
    for language, entry in entries:
        vocabulary[language].update(entry.get("facts") or [])
    return dict(vocabulary)


def score_turn(
    entry: dict, language: str, prediction: str, answer: str, vocabulary: dict[str, set[str]]
) -> dict:
    """One record for `summarise`. `entry` is the turn's `scoring` object of the jsonl."""
    answer_type = entry.get("type", "answer")
    if answer_type == "caption":
        facts = entry.get("facts") or []
        score = caption_facts(prediction, facts, vocabulary.get(language, set()))
    else:
        score = float(exact_match(prediction, answer))
    return {
        "type": answer_type,
        "language": language,
        "pair": entry.get("pair"),
        "answer": answer,
        "prediction": prediction,
        "score": score,
    }


def true_answers(sample: Sample) -> list[str]:
    return [turn["content"] for turn in sample.messages if turn["role"] == "assistant"]


def prompt_messages(sample: Sample, answers: list[str]) -> list[dict]:
    """The conversation up to the question that follows the model's own `answers`."""
    messages, own = [], iter(answers)
    for message in sample.messages:
        if message["role"] == "assistant":
            answer = next(own, None)
            if answer is None:
                break
            message = {"role": "assistant", "content": answer or "-"}  # templates want some text
        messages.append(message)
    return messages


def _mean_score(records: Iterable[dict]) -> float | None:
    scores = [record["score"] for record in records]
    return sum(scores) / len(scores) if scores else None


def _grouped(records: Iterable[dict], key: Callable[[dict], str]) -> dict[str, list[dict]]:
    groups = defaultdict(list)
    for record in records:
        groups[key(record)].append(record)
    return dict(sorted(groups.items()))


def _asked_alike(record: dict) -> tuple[str, str]:
    """Types that differ in a number only (`count_3`, `count_4`) are asked in the same words."""
    return re.sub(r"_\d+$", "", record["type"]), record["language"]


def _guesses(records: Iterable[dict]) -> list[dict]:
    """Scores of always giving the most common answer to each type of question in each language: the
    bar that a model has to clear before it has seen anything."""
    answers = defaultdict(Counter)
    for record in records:
        answers[_asked_alike(record)][normalise(record["answer"])] += 1
    guess = {name: counts.most_common(1)[0][0] for name, counts in answers.items()}
    return [
        {
            "type": record["type"],
            "score": normalise(record["answer"]) == guess[_asked_alike(record)],
        }
        for record in records
    ]


def summarise(records: Sequence[dict]) -> dict:
    """All figures of one run over a test set, as fractions; None where there was nothing to score.

    Captions are scored by their facts and stand apart: `all` and the groups hold exact match only.
    A pair counts when at least two of its lines were answered, and is right when all of them are.
    """
    questions = [record for record in records if record["type"] != "caption"]
    captions = [record for record in records if record["type"] == "caption"]
    by_type = _grouped(questions, lambda record: record["type"])
    by_language = _grouped(questions, lambda record: record["language"])
    paired = _grouped((r for r in questions if r["pair"]), lambda record: record["pair"])
    pairs = [{"score": min(r["score"] for r in same)} for same in paired.values() if len(same) > 1]
    guesses = _guesses(questions)

    def means(groups: dict[str, list[dict]]) -> dict[str, float | None]:
        return {name: _mean_score(group) for name, group in groups.items()}

    return {
        "all": _mean_score(questions),
        "reversed": _mean_score(pairs),
        "captions": _mean_score(captions),
        "by_type": means(by_type),
        "by_language": means(by_language),
        "majority": {
            "all": _mean_score(guesses),
            "by_type": means(_grouped(guesses, lambda guess: guess["type"])),
        },
        "counts": {
            "questions": len(questions),
            "pairs": len(pairs),
            "captions": len(captions),
            "by_type": {name: len(group) for name, group in by_type.items()},
        },
    }


def format_table(summaries: dict[str, dict]) -> str:
    """Several runs over the same questions (the controls) side by side, in percent."""
    first = next(iter(summaries.values()))

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f}"

    def row(name: str, count, majority, values: Iterable) -> str:
        cells = "".join(f"{percent(value):>12}" for value in values)
        return f"{name:<18}{count:>7}{majority:>10}{cells}"

    counts, majority, runs = first["counts"], first["majority"], summaries.values()
    lines = [
        f"{'':<18}{'n':>7}{'majority':>10}" + "".join(f"{name:>12}" for name in summaries),
        row(
            "all questions", counts["questions"], percent(majority["all"]), (s["all"] for s in runs)
        ),
    ]
    for name, count in counts["by_type"].items():
        bar = percent(majority["by_type"][name])
        lines.append(row(f"  {name}", count, bar, (s["by_type"][name] for s in runs)))
    for language in first["by_language"]:
        lines.append(row(f"  in {language}", "", "", (s["by_language"][language] for s in runs)))
    lines.append(row("reversed pairs", counts["pairs"], "", (s["reversed"] for s in runs)))
    lines.append(row("captions' facts", counts["captions"], "", (s["captions"] for s in runs)))
    return "\n".join(lines)
