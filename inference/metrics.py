"""Scores of answers, and how sure they are: what eval.py computes, as functions of plain values.

No judge, and nothing is guessed: an answer that can't be read is wrong. Intervals and comparisons
are clustered by video, because questions about one video are right or wrong together: on Video-MME
that triples the naive standard error.
"""

import math
import re
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

import numpy as np

from dataset.scoring import normalise

LETTERS = "ABCDEFGHIJ"
CJK = r"\u3400-\u9fff\uf900-\ufaff"
SAYS_ANSWER = r"(?:the\s+)?(?:best\s+|correct\s+)?(?:answer|option|choice)?\s*(?:is)?\s*:?\s*"


# ------------------------------------------------------------------------------------ one answer


def parse_letter(text: str, num_options: int) -> int | None:
    """The option that an answer names by its letter: "B", "(b)", "B. because", "Answer: B".

    None where it names none. A letter counts at the start only, and only if it stands by itself:
    "A man walks" isn't option A, as it is by the rules of MVBench and Video-MME.
    """
    match = re.match(rf"\s*{SAYS_ANSWER}\(?([a-z])(?:[).:]|\s*$)", text, re.IGNORECASE)
    place = LETTERS.find(match[1].upper()) if match else -1
    return place if 0 <= place < num_options else None


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


# --------------------------------------------------------------------------------------- certainty


@dataclass
class Estimate:
    """A mean with its 95 % interval."""

    score: float
    low: float
    high: float
    n: int  # questions
    clusters: int  # videos


def estimate(
    scores: Sequence[float], clusters: Sequence[Hashable], bounded: bool = True
) -> Estimate:
    """The mean of the scores, its interval clustered by video.

    The standard error adds up the residuals within each cluster first (Liang and Zeger 1986, as in
    arXiv 2411.00640, 2.2). bounded: scores lie in 0 to 1, and the interval is Wilson's for so many
    independent questions as have this standard error: it stays within 0 and 1, and a score of 100 %
    isn't certain. Raises ValueError for no scores.
    """
    if not len(scores):
        raise ValueError("no scores to estimate a mean of")
    scores_N = np.asarray(scores, dtype=float)
    mean, n = float(scores_N.mean()), len(scores_N)
    error, num_clusters = _clustered_error(scores_N, clusters)
    z = _student(num_clusters - 1)
    if not bounded:
        return Estimate(mean, mean - z * error, mean + z * error, n, num_clusters)
    effective = mean * (1 - mean) / error**2 if error > 0 and 0 < mean < 1 else num_clusters
    center = (mean + z**2 / (2 * effective)) / (1 + z**2 / effective)
    half = math.sqrt(max(mean * (1 - mean), 0) / effective + (z / (2 * effective)) ** 2)
    half *= z / (1 + z**2 / effective)
    return Estimate(mean, max(center - half, 0.0), min(center + half, 1.0), n, num_clusters)


def compare(
    ours: Sequence[float], theirs: Sequence[float], clusters: Sequence[Hashable]
) -> Estimate:
    """Our mean minus theirs over the same questions, in the same order, with its interval: paired,
    because both runs find the same questions hard. It is a difference where 0 lies outside."""
    return estimate(np.subtract(ours, theirs), clusters, bounded=False)


def _clustered_error(scores_N: np.ndarray, clusters: Sequence[Hashable]) -> tuple[float, int]:
    """Standard error of the mean, and how many clusters there are."""
    number: dict[Hashable, int] = {}
    places_N = [number.setdefault(cluster, len(number)) for cluster in clusters]
    sums_C = np.bincount(places_N, scores_N - scores_N.mean(), len(number))
    correction = len(number) / max(len(number) - 1, 1)
    return math.sqrt(correction * float(sums_C @ sums_C)) / len(scores_N), len(number)


def _student(degrees: int) -> float:
    """97.5 % quantile of Student's t, by its expansion around the normal one (Fisher and Cornish
    1960); exact to 1 % from 4 degrees of freedom on."""
    z, v = 1.959964, max(degrees, 1)
    return z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
