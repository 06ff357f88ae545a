"""What a score means nothing below: what is reached without the video, often without the question.

Chance is rarely 1 in 4, and texts give answers away: on MVBench a table of its answers' texts gets
38 %, where chance is 28 % and published models of 256 million parameters get 33 %.
"""

import zlib
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence

import numpy as np

FOLDS = 10


def chance(options: Sequence[Sequence[str]]) -> float:
    """The expected score of choosing at random: the mean of 1 / number of options."""
    return float(np.mean([1 / len(each) for each in options]))


def fixed_letter(rights: Sequence[int]) -> float:
    """The score of always choosing the same place, of the best one."""
    return Counter(rights).most_common(1)[0][1] / len(rights)


def longest_option(options: Sequence[Sequence[str]], rights: Sequence[int]) -> float:
    """The score of always choosing the option with the most characters, its expectation among
    equals."""
    scores = []
    for texts, right in zip(options, rights, strict=True):
        lengths = [len(text) for text in texts]
        longest = [place for place, length in enumerate(lengths) if length == max(lengths)]
        scores.append((right in longest) / len(longest))
    return float(np.mean(scores))


def answer_table(
    options: Sequence[Sequence[Hashable]], rights: Sequence[int], clusters: Sequence[Hashable]
) -> float:
    """The score of choosing the option whose text is most often right where it is offered.

    The table is made of the other videos' questions (10 folds by video), with one right offer in
    as many as there are options added to each text, so that a text seen once isn't certain. It
    knows neither the video nor the question: what it gets is how far the answers give themselves
    away.
    """
    right_in, offered_in = (defaultdict(Counter) for _ in range(2))
    folds = [fold_of(cluster) for cluster in clusters]
    for texts, right, fold in zip(options, rights, folds, strict=True):
        right_in[fold][texts[right]] += 1
        offered_in[fold].update(texts)
    all_right, all_offered = sum(right_in.values(), Counter()), sum(offered_in.values(), Counter())
    scores = []
    for texts, right, fold in zip(options, rights, folds, strict=True):
        prior = 1 / len(texts)
        rates = [
            (all_right[text] - right_in[fold][text] + prior)
            / (all_offered[text] - offered_in[fold][text] + 1)
            for text in texts
        ]
        best = [place for place, rate in enumerate(rates) if rate >= max(rates) - 1e-9]
        scores.append((right in best) / len(best))
    return float(np.mean(scores))


def prefix_table(
    questions: Sequence[str], answers: Sequence[Hashable], clusters: Sequence[Hashable]
) -> float:
    """The same for short answers: the most frequent answer among the other videos' questions that
    start with the same four words, or else fewer."""
    tables: dict[int, dict[tuple, Counter]] = defaultdict(lambda: defaultdict(Counter))
    folds = [fold_of(cluster) for cluster in clusters]
    starts = [[tuple(text.lower().split()[:n]) for n in (4, 3, 2, 1, 0)] for text in questions]
    for keys, answer, fold in zip(starts, answers, folds, strict=True):
        for key in keys:
            tables[fold][key][answer] += 1
    known: dict[int, dict[tuple, Hashable]] = {}
    for fold in set(folds):
        merged: dict[tuple, Counter] = defaultdict(Counter)
        for other, table in tables.items():
            if other != fold:
                for key, counts in table.items():
                    merged[key].update(counts)
        known[fold] = {key: counts.most_common(1)[0][0] for key, counts in merged.items()}
    guesses = [
        next((known[fold][key] for key in keys if key in known[fold]), None)
        for keys, fold in zip(starts, folds, strict=True)
    ]
    return float(np.mean([guess == true for guess, true in zip(guesses, answers, strict=True)]))


def fold_of(cluster: Hashable) -> int:
    """Always the same fold for the same video."""
    return zlib.crc32(str(cluster).encode()) % FOLDS
