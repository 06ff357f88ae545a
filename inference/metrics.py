"""Scores of answers, their floors, and how sure they are, as functions of plain values.

No judge, and nothing is guessed: an answer that can't be read is wrong. Intervals and comparisons
are clustered by video, because questions about one video are right or wrong together: on Video-MME
that triples the naive standard error.
"""

import math
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from difflib import SequenceMatcher

import numpy as np

from inference.scoring import normalise

LETTERS = "ABCDEFGHIJ"
CJK = r"\u3400-\u9fff\uf900-\ufaff"
FOLDS = 10
SAYS_ANSWER = r"(?:the\s+)?(?:best\s+|correct\s+)?(?:answer|option|choice)?\s*(?:is)?\s*:?\s*"


# ------------------------------------------------------------------------------------ one answer


def parse_letter(text: str, options: Sequence) -> int | None:
    """The option that an answer names by its letter: "B", "(b)", "B. because", "Answer: B".

    None where it names none. A letter counts at the start only, and only if it stands by itself:
    "A man walks" isn't option A, as it is by the rules of MVBench and Video-MME.
    """
    match = re.match(rf"\s*{SAYS_ANSWER}\(?([a-z])(?:[).:]|\s*$)", text, re.IGNORECASE)
    place = LETTERS.find(match[1].upper()) if match else -1
    return place if 0 <= place < len(options) else None


def closest_option(text: str, options: Sequence[str]) -> int | None:
    """The option that a free answer says: the one whose words, in their order, it shares most of.

    None where two are as close, or where it shares less than half with each.
    """
    words = _words(normalise(text))
    close = [SequenceMatcher(None, words, _words(normalise(o))).ratio() for o in options]
    best = max(close)
    return close.index(best) if best >= 0.5 and close.count(best) == 1 else None


def token_f1(prediction: str, answer: str) -> float:
    """Harmonic mean of precision and recall over words, 0 to 1 (SQuAD, arXiv 1606.05250); of
    Chinese, over characters."""
    found, true = (Counter(_words(normalise(text))) for text in (prediction, answer))
    common = (found & true).total()
    return 2 * common / (found.total() + true.total()) if common else 0.0


def _words(text: str) -> list[str]:
    """Words of a normalised text; a Chinese character is one by itself."""
    return re.findall(rf"[{CJK}]|[^\s{CJK}]+", text)


def interval_iou(prediction: str, seconds: Sequence[float]) -> float:
    """Overlap over union of the true interval and the first two numbers that the answer names, 0 to
    1; 0 where it doesn't name two. In either order, minutes as 1:05."""
    times = re.findall(r"\d+(?::\d+)+(?:\.\d+)?|\d+(?:\.\d+)?", prediction)[:2]
    if len(times) < 2:
        return 0.0
    start, end = sorted(
        sum(60**i * float(p) for i, p in enumerate(t.split(":")[::-1])) for t in times
    )
    both = min(end, seconds[1]) - max(start, seconds[0])
    either = max(end, seconds[1]) - min(start, seconds[0])
    return max(both, 0.0) / either if either else 0.0


def cider(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr (arXiv 1411.5726) of each caption by the field's reference code, pycocoevalcap.

    The mean is the score of the set, and rare words weigh more: it depends on the whole set. Texts
    are lower case without punctuation, English clitics apart, as COCO's tokenizer does (Stanford's,
    in Java; of VITATECS's 27,676 captions 7 differ). Chinese is cut into characters: no dictionary,
    whose version would change the score; with another segmentation figures aren't comparable.
    Raises ValueError, with the command, where the library isn't installed.
    """
    try:
        from pycocoevalcap.cider.cider import Cider
    except ImportError:
        raise ValueError(
            "captions are scored by pycocoevalcap: pip install --no-deps pycocoevalcap==1.2"
        ) from None
    asked = {i: [caption_tokens(text)] for i, text in enumerate(predictions)}
    true = {i: [caption_tokens(text) for text in texts] for i, texts in enumerate(references)}
    return Cider().compute_score(true, asked)[1].tolist()


def caption_tokens(text: str) -> str:
    """A caption's words with spaces between them, as CIDEr counts them."""
    clitic, word = r"(?:n't|'(?:s|re|ve|ll|d|m))\b", rf"[^\W_{CJK}]+"
    text = re.sub(rf"(?<=\w)({clitic})", r" \1", text.lower().replace("’", "'"))
    words = re.findall(rf"[{CJK}]|{clitic}|{word}(?:[-./]{word})*|[$&#%>]", text)
    return " ".join(words)


# -------------------------------------------------------------------------- likelihoods and groups


def best_option(
    sums: Sequence[float], tokens: Sequence[int], blank: Sequence[float] | None = None
) -> dict[str, int]:
    """The most probable option by each rule, from the log-likelihood of each option's text; -1
    where several are equally probable: that prefers nothing.

    likelihood: the sum over its tokens, its end included, so the probability of that answer; a
    token: the mean, which doesn't favour short ones; - blank: the sum's difference to the same with
    a blank video, which leaves what the video adds (only with `blank`).
    """
    values = {"likelihood": np.asarray(sums)}
    values["likelihood a token"] = values["likelihood"] / np.asarray(tokens)
    if blank is not None:
        values["likelihood - blank"] = values["likelihood"] - np.asarray(blank)
    return {
        rule: int(values_K.argmax()) if (values_K == values_K.max()).sum() == 1 else -1
        for rule, values_K in values.items()
    }


def two_by_two(first: Sequence[float], second: Sequence[float]) -> dict[str, float]:
    """Winoground's scores (arXiv 2204.03162, eq. 1-3) of two videos and two captions, 0 or 1.

    first, second: log-likelihoods of both captions given the first or the second video, whose own
    caption stands at its place. text: each video prefers its caption; video: each caption prefers
    its video; group: both. Equal likelihoods prefer nothing.
    """
    (a, b), (c, d) = first, second
    text, video = a > b and d > c, a > c and d > b
    return {"text": float(text), "video": float(video), "group": float(text and video)}


# ----------------------------------------------------------------------------------------- floors
# A score means nothing below what is reached without the video, often without the question: on
# MVBench a table of its answers' texts gets 38 %, where chance is 28 % and published models of 256
# million parameters get 33 %.


def chance(options: Sequence[Sequence]) -> float:
    """The expected score of choosing at random."""
    return float(np.mean([1 / len(each) for each in options]))


def most_frequent(rights: Sequence[Hashable]) -> float:
    """The score of always giving the same answer, or choosing the same place: of the best one."""
    return Counter(rights).most_common(1)[0][1] / len(rights)


def longest_option(options: Sequence[str], right: int) -> float:
    """The score of choosing the option with the most characters, its expectation among equals."""
    lengths = [len(text) for text in options]
    return (lengths[right] == max(lengths)) / lengths.count(max(lengths))


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
    folds = [zlib.crc32(str(cluster).encode()) % FOLDS for cluster in clusters]  # a video's own
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


# --------------------------------------------------------------------------------------- certainty


def estimate(
    scores: Sequence[float], clusters: Sequence[Hashable], bounded: bool = True
) -> dict[str, float]:
    """`score`, the mean, with `low` and `high`, its 95 % interval clustered by video; `n` questions
    and `clusters`, videos.

    The standard error adds up the residuals within each cluster first (Liang and Zeger 1986, as in
    arXiv 2411.00640, 2.2). bounded: scores lie in 0 to 1, and the interval is Wilson's for so many
    independent questions as have this standard error: it stays within 0 and 1, and a score of 100 %
    isn't certain. Raises ValueError for no scores.
    """
    if not len(scores):
        raise ValueError("no scores to estimate a mean of")
    scores_N = np.asarray(scores, dtype=float)
    mean, n = float(scores_N.mean()), len(scores_N)
    number = {cluster: place for place, cluster in enumerate(dict.fromkeys(clusters))}
    num_clusters = len(number)
    sums_C = np.bincount([number[cluster] for cluster in clusters], scores_N - mean)
    correction = num_clusters / max(num_clusters - 1, 1)
    error = math.sqrt(correction * float(sums_C @ sums_C)) / n
    z = _student(num_clusters - 1)
    about = {"n": n, "clusters": num_clusters}
    if not bounded:
        return {"score": mean, "low": mean - z * error, "high": mean + z * error, **about}
    effective = mean * (1 - mean) / error**2 if error > 0 and 0 < mean < 1 else num_clusters
    center = (mean + z**2 / (2 * effective)) / (1 + z**2 / effective)
    half = math.sqrt(max(mean * (1 - mean), 0) / effective + (z / (2 * effective)) ** 2)
    half *= z / (1 + z**2 / effective)
    return {"score": mean, "low": max(center - half, 0.0), "high": min(center + half, 1.0), **about}


def _student(degrees: int) -> float:
    """97.5 % quantile of Student's t, by its expansion around the normal one (Fisher and Cornish
    1960); exact to 1 % from 4 degrees of freedom on."""
    z, v = 1.959964, max(degrees, 1)
    return z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
