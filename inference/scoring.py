"""Scores answers about videos without a judge: exact match, facts of captions, reversed pairs.

Exact match can't be talked into a good mark, and a pair (a clip and the same clip played backwards)
is right only when both answers are: a model that doesn't see time gets none.
"""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

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
    record = {"type": entry.get("type", "answer"), "language": language, "pair": entry.get("pair")}
    if record["type"] == "caption":
        facts = entry.get("facts") or []
        score = caption_facts(prediction, facts, vocabulary.get(language, set()))
    else:
        score = float(exact_match(prediction, answer))
    return record | {"answer": answer, "prediction": prediction, "score": score}


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


def _mean(scores: Iterable[float]) -> float | None:
    scores = list(scores)
    return sum(scores) / len(scores) if scores else None


def _means(scores: Iterable[tuple[str, float]]) -> dict[str, float]:
    """The mean of each name's scores."""
    groups = defaultdict(list)
    for name, score in scores:
        groups[name].append(score)
    return {name: _mean(group) for name, group in sorted(groups.items())}


def _asked_alike(record: dict) -> tuple[str, str]:
    """Types that differ in a number only (`count_3`, `count_4`) are asked in the same words."""
    return re.sub(r"_\d+$", "", record["type"]), record["language"]


def summarise(records: Sequence[dict]) -> dict:
    """All figures of one run over a test set, as fractions; None where there was nothing to score.

    Captions are scored by their facts and stand apart: `all` and the groups hold exact match only.
    A pair counts when at least two of its lines were answered, and is right when all of them are.
    `majority` is the score of always giving the most common answer to each type of question in each
    language: the bar that a model has to clear before it has seen anything.
    """
    questions = [record for record in records if record["type"] != "caption"]
    captions = [record["score"] for record in records if record["type"] == "caption"]
    paired, answers = defaultdict(list), defaultdict(Counter)
    for record in questions:
        paired[record["pair"]].append(record["score"])
        answers[_asked_alike(record)][normalise(record["answer"])] += 1
    paired.pop(None, None)
    pairs = [min(scores) for scores in paired.values() if len(scores) > 1]
    guess = {name: counts.most_common(1)[0][0] for name, counts in answers.items()}
    guessed = [(r["type"], normalise(r["answer"]) == guess[_asked_alike(r)]) for r in questions]
    return {
        "all": _mean(record["score"] for record in questions),
        "reversed": _mean(pairs),
        "captions": _mean(captions),
        "by_type": _means((record["type"], record["score"]) for record in questions),
        "by_language": _means((record["language"], record["score"]) for record in questions),
        "majority": {"all": _mean(score for _, score in guessed), "by_type": _means(guessed)},
        "counts": {
            "questions": len(questions),
            "pairs": len(pairs),
            "captions": len(captions),
            "by_type": dict(sorted(Counter(record["type"] for record in questions).items())),
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
