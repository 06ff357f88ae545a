"""The figures of published scorers, and ours, on the same 200 made answers.

Theirs were run as they stand at Vinoground/Vinoground 1543a2a, lscpku/VITATECS 58bff59,
MME-Benchmarks/Video-MME 4e7566d, jiyanggao/TALL 3df6794, JUNJIE99/MLVU fd060c1,
daniel-cores/tvbench c354322, OpenGVLab/Ask-Anything 4dd8210, llyx97/TempCompass e1b4631,
EvolvingLMMs-Lab/lmms-eval 75571cf (LongVideoBench, EgoSchema, mean IoU) and pycocoevalcap 1.2 with
its Java tokenizer (VATEX). Where they err, docs/benchmarks.md says how.
"""

import json
import random

import pytest

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
def test_the_same_answers_get_the_published_scorers_figures(lines, figures, tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text("\n".join(map(json.dumps, [{}, *lines])) + "\n")
    rows = summarise_answers(read_results(path))["benchmarks"]["b"]["rows"]
    assert {name: rows[name]["score"] for name in figures} == pytest.approx(figures, abs=1e-9)
