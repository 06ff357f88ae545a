"""From the answers' file of a test set to its figures: scores, floors, controls, comparisons.

A question whose video is missing counts as wrong, and `answered` stands beside it: the score of the
questions that could be asked. Memory holds numbers, not texts, of the questions of a benchmark.
"""

import json
from array import array
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from sys import intern

import numpy as np

from dataset.scoring import (
    exact_match,
    fact_vocabulary,
    format_table,
    normalise,
    score_turn,
    summarise,
)
from inference import floors, metrics
from inference.test_set import read_answers

# The measure that stands for a benchmark where one figure is wanted: the first that it has.
HEADLINES = ("group", "likelihood", "CIDEr", "mean IoU", "exact match")
RULES = {"sum": "likelihood", "mean": "likelihood a token", "blank": "likelihood - blank"}
PAIR_CHANCES = {"text": 1 / 4, "video": 1 / 4, "group": 1 / 6}  # arXiv 2204.03162


class Questions:
    """The questions of one benchmark as columns: what they are, and a score for each way to measure
    them under each control (NaN where a question has none)."""

    def __init__(self):
        self.keys: list[tuple[str, int]] = []  # sample's id and turn
        self.clusters: list[str] = []  # its video, or its pair of videos
        self.videos: set[int] = set()  # hashes of their names
        self.types: list[str] = []
        self.subsets: list[tuple[str, ...]] = []
        self.missing = array("b")
        self.scores: dict[tuple[str, str], array] = {}  # (measure, control)
        self.parsed = array("b")  # whether a generated letter or text names an option
        # By the question's place, of those that have some:
        self.options: dict[int, tuple[tuple[int, ...], int]] = {}  # hashes of texts; the right one
        self.short_answers: dict[int, tuple[str, str]] = {}  # first words asked, the true answer
        self.captions: list[tuple[dict[str, str], list[str]]] = []  # by control; references
        self.pairs: dict[str, list[tuple[int, dict]]] = defaultdict(list)  # group → its questions
        self.judged = 0  # answers that aren't scored here

    def add(self, line: dict, number: int) -> None:
        """A turn of a line of the answers' file."""
        turn = line["turns"][number]
        entry = turn["scoring"]
        if entry["metric"] == "judge":
            self.judged += 1
            return
        self.keys.append((line["id"], number))
        self.clusters.append(intern(entry.get("group") or " ".join(line["visuals"]) or line["id"]))
        self.videos.update(map(hash, line["visuals"]))
        self.types.append(intern(entry["type"]))
        self.subsets.append(tuple(map(intern, entry.get("subsets", ()))))
        self.missing.append(bool(line["missing"]) or entry["metric"] == "faulty")
        if not self.missing[-1]:
            for (measure, control), score in score_answer(turn).items():
                self._put(measure, control, score)
            if (place := generated_choice(turn)) is not None:
                self.parsed.append(place >= 0)
        if entry["metric"] == "choice":
            options, right = entry["options"], entry["right"]
            texts = tuple(hash(normalise(text)) for text in options)
            self.options[len(self.keys) - 1] = (texts, right)
            self._put("floor", "longest option", floors.longest_option([options], [right]))
            if "group" in entry:
                self.pairs[entry["group"]].append((right, turn["logprobs"]))
        elif entry["metric"] == "match":
            start = intern(" ".join(turn["question"].lower().split()[:4]))
            self.short_answers[len(self.keys) - 1] = (start, intern(normalise(turn["answer"])))
        elif entry["metric"] == "cider":
            self.captions.append((turn["answers"], entry["references"]))

    def _put(self, measure: str, control: str, score: float) -> None:
        column = self.scores.setdefault((measure, control), array("f"))
        column.extend([np.nan] * (len(self.keys) - 1 - len(column)))
        column.append(score)

    def column(self, measure: str, control: str = "normal") -> np.ndarray:
        """The scores of all questions; what wasn't asked is 0."""
        column = np.zeros(len(self.keys))
        found = np.frombuffer(self.scores[measure, control], np.float32)
        column[: len(found)] = np.nan_to_num(found)
        return column


def score_answer(turn: dict) -> dict[tuple[str, str], float]:
    """(measure, control) → score of one turn. Captions are scored as a set, not here."""
    entry, answers = turn["scoring"], turn["answers"]
    found = {}
    if entry["metric"] == "choice":
        for control, sums in turn["logprobs"].items():
            blank = None if control == "no video" else turn["logprobs"].get("no video")
            for rule, place in metrics.best_option(sums, turn["tokens"], blank).items():
                if place is not None:
                    found[RULES[rule], control] = float(place == entry["right"])
        if (place := generated_choice(turn)) is not None:
            kind = "generated letter" if "letter" in turn else "generated text"
            found[kind, "normal"] = float(place == entry["right"])
    elif entry["metric"] == "match":
        for control, text in answers.items():
            found["exact match", control] = float(exact_match(text, turn["answer"]))
            found["verbatim", control] = float(text == turn["answer"])
            found["token F1", control] = metrics.token_f1(text, turn["answer"])
    elif entry["metric"] == "span":
        for control, text in answers.items():
            iou = metrics.interval_iou(text, entry["seconds"])
            found["mean IoU", control] = iou
            for least in (0.3, 0.5, 0.7):
                found[f"R1@{least}", control] = float(iou >= least)
    return found


def generated_choice(turn: dict) -> int | None:
    """The option that a generated letter or text names; -1: none; None: nothing was generated."""
    options = turn["scoring"].get("options", ())
    if "letter" in turn:
        place = metrics.parse_letter(turn["letter"], len(options))
    elif "text" in turn:
        place = metrics.closest_option(turn["text"], options)
    else:
        return None
    return -1 if place is None else place


# --------------------------------------------------------------------------------------- the file


def read_questions(path: Path) -> tuple[dict[str, Questions], dict[str, list[dict]]]:
    """The questions of each benchmark, and for `dataset.scoring.summarise` the records of all other
    questions by control."""
    benchmarks, others = defaultdict(Questions), defaultdict(list)
    facts = (  # a caption is scored by all facts of its test set: the file is read twice
        (line["language"], {"facts": turn["scoring"]["facts"]})
        for line in _samples(path)
        for turn in line["turns"]
        if "facts" in turn["scoring"]
    )
    vocabulary = fact_vocabulary(facts)
    for line in _samples(path):
        for number, turn in enumerate(line["turns"]):
            if "metric" in (entry := turn["scoring"]):
                benchmarks[entry.get("benchmark", "-")].add(line, number)
                continue
            about = {"id": line["id"], "visuals": line["visuals"], "turn": number}
            about["question"] = turn["question"]
            for control, text in turn["answers"].items():
                score = score_turn(entry, line["language"], text, turn["answer"], vocabulary)
                others[control].append(about | score)
    for questions in benchmarks.values():
        _score_captions(questions)
    return benchmarks, others


def _samples(path: Path) -> Iterable[dict]:
    lines = read_answers(path)
    next(lines)  # what was asked of what
    return lines


def _score_captions(questions: Questions) -> None:
    asked = [(answers, true) for answers, true in questions.captions if answers]
    for control in asked[0][0] if asked else ():
        scores = iter(metrics.cider([a[control] for a, _ in asked], [true for _, true in asked]))
        column = [0.0 if missing else next(scores) for missing in questions.missing]
        questions.scores["CIDEr", control] = array("f", column)


# ------------------------------------------------------------------------------------- the figures


def summarise_answers(path: Path) -> dict:
    """All figures of an answers' file as fractions: `benchmarks` by name; of questions that belong
    to none `controls` (what `dataset.scoring.summarise` says) and the `interval` of their score."""
    benchmarks, others = read_questions(path)
    result = _count_samples(path)
    result["benchmarks"] = {name: summarise_questions(q) for name, q in benchmarks.items()}
    result["controls"] = {control: summarise(records) for control, records in others.items()}
    if graded := [r for r in others.get("normal", ()) if r["type"] != "caption"]:
        clips = [" ".join(r["visuals"]) for r in graded]
        result["interval"] = asdict(metrics.estimate([r["score"] for r in graded], clips))
    if "normal" in others:
        result["accuracy"] = result["controls"]["normal"]
    return result


def _count_samples(path: Path) -> dict:
    """How many were asked, about how many clips, and why the others weren't."""
    asked, unasked, clips, left_out = 0, 0, set(), {}
    for line in _samples(path):
        if line["missing"]:
            unasked += 1
            left_out[" ".join(line["visuals"]) or line["where"]] = line["missing"]
        else:
            asked += 1
            clips.update(map(hash, line["visuals"]))
    return {"samples": asked, "unasked": unasked, "clips": len(clips), "left_out": left_out}


def summarise_questions(questions: Questions) -> dict:
    """The figures of one benchmark."""
    result = {
        **{"questions": len(questions.keys), "videos": len(questions.videos)},
        **{"missing": sum(questions.missing), "judged": questions.judged},
    }
    if not questions.keys:
        return result | {"rows": {}}
    every = np.arange(len(questions.keys))
    measures = list(dict.fromkeys(measure for measure, _ in questions.scores if measure != "floor"))
    rows = {measure: _row(questions, measure, every) for measure in measures}
    rows = _pair_rows(questions) | rows
    headline = next((name for name in HEADLINES if name in rows), None)
    if questions.parsed:
        result["parsed"] = float(np.mean(questions.parsed))
    if (by := "likelihood" if headline == "group" else headline) in measures:
        types, labels = np.array(questions.types), sorted(set(questions.types))
        rows |= {f"  {t}": _row(questions, by, np.flatnonzero(types == t)) for t in labels}
        result["mean_of_types"] = float(np.mean([rows[f"  {t}"]["score"] for t in labels]))
        for name in sorted({name for subsets in questions.subsets for name in subsets}):
            members = [i for i, subsets in enumerate(questions.subsets) if name in subsets]
            rows[f"  of {name}"] = _row(questions, by, np.array(members))
    return result | {"headline": headline, "rows": rows}


def _row(questions: Questions, measure: str, members: np.ndarray) -> dict:
    """One line of the table: a measure of some of the questions, their floors and controls."""
    clusters = [questions.clusters[i] for i in members]
    scores = questions.column(measure)[members]
    asked = np.frombuffer(questions.missing, np.int8)[members] == 0
    row = asdict(metrics.estimate(scores, clusters, bounded=measure != "CIDEr"))
    row = {"score": row.pop("value"), **row}
    row["answered"] = float(scores[asked].mean()) if asked.any() else None
    row["controls"] = {
        control: float(questions.column(name, control)[members].mean())
        for name, control in questions.scores
        if name == measure and control != "normal"
    }
    if optional := [i for i in members if i in questions.options]:
        options, rights = zip(*(questions.options[i] for i in optional), strict=True)
        clusters = [questions.clusters[i] for i in optional]
        row["floors"] = {
            "chance": floors.chance(options),
            "fixed letter": floors.fixed_letter(rights),
            "longest option": float(questions.column("floor", "longest option")[optional].mean()),
            "answer table": floors.answer_table(options, rights, clusters),
        }
    elif short := [i for i in members if i in questions.short_answers]:
        starts, answers = zip(*(questions.short_answers[i] for i in short), strict=True)
        clusters = [questions.clusters[i] for i in short]
        row["floors"] = {
            "most frequent": floors.fixed_letter(answers),
            "question table": floors.prefix_table(starts, answers, clusters),
        }
    return row


def _pair_rows(questions: Questions) -> dict[str, dict]:
    """Two videos and two captions, four likelihoods (Winoground, Vinoground)."""
    pairs = {g: dict(pair) for g, pair in questions.pairs.items() if len(pair) == 2}
    if not pairs:
        return {}
    found = defaultdict(lambda: defaultdict(list))
    complete = [pair for pair in pairs.values() if pair[0] and pair[1]]
    for pair in pairs.values():
        for control in complete[0][0] if complete else ("normal",):
            both = control in pair[0] and control in pair[1]
            scores = metrics.two_by_two(pair[0][control], pair[1][control]) if both else {}
            for name in PAIR_CHANCES:
                found[name][control].append(scores.get(name, 0.0))
    rows = {}
    for name, controls in found.items():
        row = asdict(metrics.estimate(controls["normal"], list(pairs)))
        answered = [
            s
            for s, pair in zip(controls["normal"], pairs.values(), strict=True)
            if pair[0] and pair[1]
        ]
        rows[name] = {
            **{"score": row.pop("value"), **row},
            "answered": float(np.mean(answered)) if answered else None,
            "controls": {c: float(np.mean(s)) for c, s in controls.items() if c != "normal"},
            "floors": {"chance": PAIR_CHANCES[name]},
        }
    return rows


def compare_answers(ours: Path, theirs: Path) -> dict[str, dict]:
    """name → both scores and the paired difference over the questions that both files hold."""
    result, pairs = {}, (_headline_scores(ours), _headline_scores(theirs))
    for name in sorted(pairs[0].keys() & pairs[1].keys()):
        common = sorted(pairs[0][name].keys() & pairs[1][name].keys())
        if not common:
            continue
        (a, clusters), (b, _) = (zip(*(p[name][key] for key in common), strict=True) for p in pairs)
        difference = asdict(metrics.compare(a, b, clusters))
        scores = {"ours": float(np.mean(a)), "theirs": float(np.mean(b))}
        result[name] = scores | {"difference": difference.pop("value"), **difference}
    if not result:
        raise ValueError(f"--against {theirs}: it shares no question with this test set")
    return result


def _headline_scores(path: Path) -> dict[str, dict[tuple, tuple[float, str]]]:
    """test set → (id, turn) → (score, video)."""
    benchmarks, others = read_questions(path)
    result = {}
    for name, questions in benchmarks.items():
        measure = next((m for m in HEADLINES if (m, "normal") in questions.scores), None)
        if measure:
            scored = zip(questions.column(measure), questions.clusters, strict=True)
            result[name] = dict(zip(questions.keys, scored, strict=True))
    if "normal" in others:
        result["questions"] = {
            (r["id"], r["turn"]): (r["score"], " ".join(r["visuals"])) for r in others["normal"]
        }
    return result


def write_submissions(path: Path, folder: Path) -> list[Path]:
    """Writes the answers that only a benchmark's own judge can score, in the form that its code
    reads (MLVU's and TempCompass's), as `folder`/<its file>."""
    files: dict[str, list[tuple[dict, str]]] = defaultdict(list)
    for line in _samples(path):
        for turn in line["turns"]:
            if turn["scoring"].get("metric") == "judge":
                answer = turn["answers"].get("normal", "")
                files[turn["scoring"]["file"]].append((turn["scoring"]["record"], answer))
    for name, answers in files.items():
        content: object = [record | {"pred": answer} for record, answer in answers]
        if "dim" in answers[0][0]:  # TempCompass: video → aspect → questions
            content = defaultdict(lambda: defaultdict(list))
            for record, answer in answers:
                fields = {k: v for k, v in record.items() if k not in ("video_id", "dim")}
                place = content[record["video_id"]][record["dim"]]
                place.append(fields | {"prediction": answer})
        text = json.dumps(content, ensure_ascii=False, indent=4)
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in files]


# ------------------------------------------------------------------------------------- the tables


def format_summary(summary: dict) -> str:
    """All tables of a test set."""
    parts = [format_benchmark(name, each) for name, each in summary["benchmarks"].items()]
    if summary["controls"]:
        parts.append(format_table(summary["controls"]))
    if found := summary.get("interval"):
        parts[-1] += f"\n95 % interval of all questions, clustered by video: {_interval(found)}"
    if summary["unasked"] and summary["controls"]:
        files = len(summary["left_out"])
        parts[-1] += f"\n{summary['unasked']} samples were left out: {files} files can't be read"
    return "\n\n".join(parts)


def format_benchmark(name: str, summary: dict) -> str:
    """The table of one benchmark, in percent; CIDEr in its own points (100 times its value)."""
    share = summary["missing"] / max(summary["questions"], 1)
    head = f"{name}: {summary['questions']:,} questions about {summary['videos']:,} videos"
    if summary["missing"]:
        head += f"; {summary['missing']:,} ({share:.1%}) COULD NOT BE ASKED and count as wrong"
    if summary["judged"]:
        head += f"; {summary['judged']:,} answers are for the benchmark's own judge"
    rows = summary["rows"]
    if not rows:
        return head
    first = next(row for key, row in rows.items() if key == summary["headline"])
    floor_names = list(dict.fromkeys(key for row in rows.values() for key in row.get("floors", ())))
    control_names = list(first["controls"])
    names = ["n", "score", "95 % interval", *["answered"] * bool(summary["missing"])]
    names += [*floor_names, *control_names]
    lines = [head, f"{'':<28}" + "".join(f"{name:>15}" for name in names)]
    for key, row in rows.items():
        cells = [f"{row['n']:,}", _percent(row["score"]), _interval(row)]
        cells += [_percent(row["answered"])] * bool(summary["missing"])
        cells += [_percent(row.get("floors", {}).get(name)) for name in floor_names]
        cells += [_percent(row["controls"].get(name)) for name in control_names]
        label = f"{key} ({summary['parsed']:.0%} read)" if key.startswith("generated") else key
        lines.append(f"{label[:28]:<28}" + "".join(f"{cell:>15}" for cell in cells))
    if "mean_of_types" in summary and len(set(rows)) > 1:
        lines.append(f"mean of the types: {_percent(summary['mean_of_types'])}")
    return "\n".join(lines)


def format_comparison(found: dict[str, dict]) -> str:
    """What `compare_answers` found, in points."""
    lines = []
    for name, row in found.items():
        verdict = "no difference shown" if row["low"] <= 0 <= row["high"] else "a difference"
        lines.append(
            f"{name}: {_percent(row['ours'])} here, {_percent(row['theirs'])} there, "
            f"{100 * row['difference']:+.1f} [{100 * row['low']:+.1f}, {100 * row['high']:+.1f}] "
            f"over {row['n']:,} questions about {row['clusters']:,} videos: {verdict}"
        )
    return "\n".join(lines)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _interval(row: dict) -> str:
    return f"{_percent(row['low'])} - {_percent(row['high'])}"
