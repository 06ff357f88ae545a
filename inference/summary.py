"""From the answers' file of a test set to its figures: scores, floors, controls, comparisons.

A question whose video is missing counts as wrong, and `answered` stands beside it: the score of the
questions that could be asked. Of a benchmark's questions memory holds numbers, not texts.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from sys import intern

import numpy as np

from inference import metrics, scoring
from inference.test_set import CONTROLS, read_answers

# The measure that stands for a benchmark where one figure is wanted: the first that it has.
HEADLINES = ("group", "likelihood", "CIDEr", "mean IoU", "exact match")
OTHER_QUESTIONS = (
    "--against: those are answers to other questions (compared by id, video, question and true "
    "answer); ask both models the same test set"
)
PAIR_CHANCES = {"text": 1 / 4, "video": 1 / 4, "group": 1 / 6}  # arXiv 2204.03162


@dataclass(slots=True)
class Question:
    """What the figures need of one question of a benchmark, or of a pair that is one."""

    key: tuple  # the same question in another run has it too
    cluster: str  # its video, or its pair of videos
    is_missing: bool
    scores: defaultdict[str, dict[str, float]]  # by measure and control
    videos: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()  # its type, and "of …" for each of its subsets
    is_parsed: bool | None = None  # a generated letter or text names an option; None: none was made
    options: tuple[int, ...] = ()  # hashes of texts
    right: int | None = None  # the place of the right option, or a hash of the short answer
    longest: float = 0.0  # score of the longest option

    def score(self, measure: str, control: str = "normal") -> float:
        """0 where it wasn't asked."""
        return self.scores.get(measure, {}).get(control, 0.0)


def question_key(line: dict, number: int) -> tuple[str, int, int]:
    """The same in another run on the same data, and hardly ever in one on other data, whose ids may
    be the same."""
    turn = line["turns"][number]
    words = (turn["question"], turn["answer"], *line["visuals"])
    return line["id"], number, hash(words)


def read_question(line: dict, number: int) -> Question:
    """A turn of a line of the answers' file, with its scores; captions are scored as a set."""
    turn, videos = line["turns"][number], tuple(map(intern, line["visuals"]))
    entry, answers, scores = turn["scoring"], turn["answers"], defaultdict(dict)
    labels = entry["type"], *(f"of {subset}" for subset in entry.get("subsets", ()))
    cluster = intern(entry.get("group") or " ".join(videos) or line["id"])
    is_missing = bool(line["missing"]) or entry["metric"] == "faulty"
    question = Question(question_key(line, number), cluster, is_missing, scores, videos)
    question.labels = tuple(map(intern, labels))
    if entry["metric"] == "choice":
        options, right = entry["options"], entry["right"]
        question.options = tuple(hash(scoring.normalise(text)) for text in options)
        question.right, question.longest = right, metrics.longest_option(options, right)
        for control, sums in turn["logprobs"].items():
            blank = None if control == "no video" else turn["logprobs"].get("no video")
            for rule, place in metrics.best_option(sums, turn["tokens"], blank).items():
                scores[rule][control] = float(place == right)
        for kind, find in (("letter", metrics.parse_letter), ("text", metrics.closest_option)):
            if kind in turn:
                place = find(turn[kind], options)
                scores[f"generated {kind}"]["normal"] = float(place == right)
                question.is_parsed = place is not None
    elif entry["metric"] == "match":
        question.right = hash(scoring.normalise(turn["answer"]))
        for control, text in answers.items():
            scores["exact match"][control] = float(scoring.exact_match(text, turn["answer"]))
            scores["verbatim"][control] = float(text == turn["answer"])
            scores["token F1"][control] = metrics.token_f1(text, turn["answer"])
    elif entry["metric"] == "span":
        for control, text in answers.items():
            scores["mean IoU"][control] = iou = metrics.interval_iou(text, entry["seconds"])
            for least in (0.3, 0.5, 0.7):
                scores[f"R1@{least}"][control] = float(iou >= least)
    return question


# --------------------------------------------------------------------------------------- the file


@dataclass
class Results:
    """What an answers' file holds."""

    benchmarks: dict[str, list[Question]] = field(default_factory=lambda: defaultdict(list))
    # Two videos and two captions as one question, by benchmark.
    pairs: dict[str, list[Question]] = field(default_factory=lambda: defaultdict(list))
    judged: dict[str, int] = field(default_factory=lambda: defaultdict(int))  # not scored here
    # Of questions that belong to no benchmark: records for `scoring.summarise`, by control.
    others: dict[str, list[dict]] = field(default_factory=lambda: defaultdict(list))
    asked: int = 0
    unasked: int = 0
    clips: set[str] = field(default_factory=set)
    left_out: dict[str, str] = field(default_factory=dict)  # visuals → reason
    submissions: dict[str, list] = field(default_factory=lambda: defaultdict(list))  # by file


def read_results(path: Path) -> Results:
    facts = (  # a caption is scored by all facts of its test set: the file is read twice
        (line["language"], {"facts": turn["scoring"]["facts"]})
        for line in islice(read_answers(path), 1, None)  # the first says what was asked
        for turn in line["turns"]
        if "facts" in turn["scoring"]
    )
    vocabulary, results = scoring.fact_vocabulary(facts), Results()
    captions, halves = defaultdict(list), defaultdict(dict)  # what is scored together
    for line in islice(read_answers(path), 1, None):
        if line["missing"]:
            results.unasked += 1
            results.left_out[" ".join(line["visuals"]) or line["where"]] = line["missing"]
        else:
            results.asked += 1
            results.clips.update(map(intern, line["visuals"]))
        for number, turn in enumerate(line["turns"]):
            entry, name = turn["scoring"], turn["scoring"].get("benchmark", "-")
            if "file" in entry:
                answer = turn["answers"].get("normal", "")
                results.submissions[entry["file"]].append((entry, answer))
            if "metric" not in entry:
                about = {"visuals": line["visuals"], "question": turn["question"], "turn": number}
                about["key"], language = question_key(line, number), line["language"]
                for control, text in turn["answers"].items():
                    score = scoring.score_turn(entry, language, text, turn["answer"], vocabulary)
                    results.others[control].append(about | score)
            elif entry["metric"] == "judge":
                results.judged[name] += 1
            else:
                question = read_question(line, number)
                results.benchmarks[name].append(question)
                if entry["metric"] == "cider" and turn["answers"]:
                    captions[name].append((question, turn["answers"], entry["references"]))
                if "group" in entry:
                    halves[name, entry["group"]][entry["right"]] = question, turn["logprobs"]
    for some in captions.values():
        for control in some[0][1]:
            said, true = [answers[control] for _, answers, _ in some], [true for *_, true in some]
            for (question, *_), score in zip(some, metrics.cider(said, true), strict=True):
                question.scores["CIDEr"][control] = score
    for (name, group), pair in halves.items():
        if len(pair) == 2:
            (half, first), (_, second) = pair[0], pair[1]
            whole = Question(half.key, group, not (first and second), defaultdict(dict))
            for control in (name for name in first if name in second):
                for rule, score in metrics.two_by_two(first[control], second[control]).items():
                    whole.scores[rule][control] = score
            results.pairs[name].append(whole)
    return results


def write_submissions(results: Results, folder: Path) -> list[Path]:
    """Writes the answers that only a benchmark's own judge or server can score, in the form that it
    reads, as `folder`/<its file>. `record` is that form with null where the answer stands."""
    for name, answers in results.submissions.items():
        content: list | dict = type(answers[0][0]["record"])()
        for entry, answer in answers:
            if "labels" in entry:
                if not answer:  # no label stands for that
                    continue
                answer = entry["labels"][entry["options"].index(answer)]
            content = _merged(content, entry["record"], answer)
        text = json.dumps(content, ensure_ascii=False, indent=4)
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in results.submissions]


def _merged(content, record, answer):
    """What stands there already, and the record with its answer."""
    if isinstance(record, dict):
        new = {key: _merged((content or {}).get(key), x, answer) for key, x in record.items()}
        return (content or {}) | new
    if isinstance(record, list):
        return (content or []) + [_merged(None, value, answer) for value in record]
    return answer if record is None else record


# ------------------------------------------------------------------------------------- the figures


def summarise_answers(results: Results) -> dict:
    """All figures of an answers' file as fractions: `benchmarks` by name; of questions that belong
    to none `controls` (what `scoring.summarise` says) and the `interval` of their score."""
    names = dict.fromkeys([*results.benchmarks, *results.judged])
    result = {
        **{"samples": results.asked, "unasked": results.unasked, "clips": len(results.clips)},
        "left_out": results.left_out,
        "benchmarks": {name: _summarise_benchmark(results, name) for name in names},
        "controls": {name: scoring.summarise(some) for name, some in results.others.items()},
    }
    if graded := [r for r in results.others.get("normal", ()) if r["type"] != "caption"]:
        clips = [" ".join(r["visuals"]) for r in graded]
        result["interval"] = metrics.estimate([r["score"] for r in graded], clips)
    if "normal" in results.others:
        result["accuracy"] = result["controls"]["normal"]
    return result


def headline(results: Results, name: str) -> tuple[str | None, list[Question]]:
    """The measure that stands for a benchmark, and the questions or pairs that it scores."""
    for measure in HEADLINES:
        some = (results.pairs if measure in PAIR_CHANCES else results.benchmarks).get(name, [])
        if any(measure in question.scores for question in some):
            return measure, some
    return None, []


def _summarise_benchmark(results: Results, name: str) -> dict:
    questions, rows = results.benchmarks.get(name, []), {}
    result = {
        "questions": len(questions),
        "videos": len({video for question in questions for video in question.videos}),
        **{"missing": sum(question.is_missing for question in questions)},
        **{"judged": results.judged.get(name, 0), "rows": rows},
    }
    if not questions:
        return result
    for some in (results.pairs.get(name, []), questions):
        for measure in dict.fromkeys(measure for question in some for measure in question.scores):
            rows[measure] = _row(some, measure)
    if parsed := [q.is_parsed for q in questions if q.is_parsed is not None]:
        result["parsed"] = float(np.mean(parsed))
    result["headline"], _ = headline(results, name)
    if (by := "likelihood" if result["headline"] == "group" else result["headline"]) in rows:
        types = sorted({question.labels[0] for question in questions})
        subsets = sorted({label for question in questions for label in question.labels[1:]})
        for label in (*types, *subsets):
            rows[f"  {label}"] = _row([q for q in questions if label in q.labels], by)
        result["mean_of_types"] = float(np.mean([rows[f"  {label}"]["score"] for label in types]))
    return result


def _row(questions: Sequence[Question], measure: str) -> dict:
    """One line of the table: a measure of some questions, their floors and controls."""
    scores, clusters = [q.score(measure) for q in questions], [q.cluster for q in questions]
    row = metrics.estimate(scores, clusters, bounded=measure != "CIDEr")
    asked = [q.score(measure) for q in questions if not q.is_missing]
    row["answered"] = float(np.mean(asked)) if asked else None
    controls = dict.fromkeys(control for q in questions for control in q.scores.get(measure, ()))
    row["controls"] = {
        control: float(np.mean([q.score(measure, control) for q in questions]))
        for control in controls
        if control != "normal"
    }
    if measure in PAIR_CHANCES:
        row["floors"] = {"chance": PAIR_CHANCES[measure]}
    elif some := [q for q in questions if q.options]:
        options, rights = [q.options for q in some], [q.right for q in some]
        row["floors"] = {
            "chance": metrics.chance(options),
            "fixed letter": metrics.most_frequent(rights),
            "longest option": float(np.mean([q.longest for q in some])),
            "answer table": metrics.answer_table(options, rights, [q.cluster for q in some]),
        }
    elif short := [q.right for q in questions if q.right is not None]:
        row["floors"] = {"most frequent": metrics.most_frequent(short)}
    return row


def compare_answers(ours: Results, theirs: Results) -> dict[str, dict]:
    """name → both scores and the paired difference over the questions that both have.

    Raises ValueError where they share none.
    """
    result, pairs = {}, (_headline_scores(ours), _headline_scores(theirs))
    for name in sorted(pairs[0].keys() & pairs[1].keys()):
        common = sorted(pairs[0][name].keys() & pairs[1][name].keys())
        if not common:
            continue
        (a, clusters), (b, _) = (zip(*(p[name][key] for key in common), strict=True) for p in pairs)
        # Paired, because both runs find the same questions hard.
        found = metrics.estimate(np.subtract(a, b), clusters, bounded=False)
        found["difference"] = found.pop("score")
        result[name] = {"ours": float(np.mean(a)), "theirs": float(np.mean(b)), **found}
    if not result:
        raise ValueError(OTHER_QUESTIONS)
    return result


def check_comparable(lines: Iterable[dict], theirs: Results) -> None:
    """Raises ValueError where none of the lines' questions is one of `theirs`."""
    keys = set().union(*_headline_scores(theirs).values())
    if not any(question_key(line, n) in keys for line in lines for n in range(len(line["turns"]))):
        raise ValueError(OTHER_QUESTIONS)


def _headline_scores(results: Results) -> dict[str, dict[tuple, tuple[float, str]]]:
    """test set → key of a question → (score, video)."""
    others = results.others.get("normal", ())
    found = {"questions": {r["key"]: (r["score"], " ".join(r["visuals"])) for r in others}}
    for name in results.benchmarks:
        measure, some = headline(results, name)
        found[name] = {q.key: (q.score(measure), q.cluster) for q in some}
    return found


# ------------------------------------------------------------------------------------- the tables


def format_summary(summary: dict) -> str:
    """All tables of a test set."""
    parts = [format_benchmark(name, each) for name, each in summary["benchmarks"].items()]
    if summary["controls"]:
        parts.append(scoring.format_table(summary["controls"]))
    if found := summary.get("interval"):
        parts[-1] += f"\n95 % interval of all questions, clustered by video: {_interval(found)}"
    if summary["unasked"] and summary["controls"]:
        files = len(summary["left_out"])
        parts[-1] += f"\n{summary['unasked']} samples were left out: {files} files can't be read"
    return "\n\n".join(parts)


def format_benchmark(name: str, summary: dict) -> str:
    """The table of one benchmark, in percent; CIDEr in its own points (100 times its value)."""
    head = f"{name}: {summary['questions']:,} questions about {summary['videos']:,} videos"
    if missing := summary["missing"]:
        share = missing / summary["questions"]
        head += f"; {missing:,} ({share:.1%}) COULD NOT BE ASKED and count as wrong"
    if summary["judged"]:
        head += f"; {summary['judged']:,} answers are for the benchmark's own judge"
    table = {}
    for key, row in summary["rows"].items():
        label = f"{key} ({summary['parsed']:.0%} read)" if key.startswith("generated") else key
        table[label] = {"n": f"{row['n']:,}", "score": _percent(row["score"])}
        table[label]["95 % interval"] = _interval(row)
        if missing:
            table[label]["answered"] = _percent(row["answered"])
        for name, value in (row.get("floors", {}) | row["controls"]).items():
            table[label][name] = _percent(value)
    names = dict.fromkeys(name for cells in table.values() for name in cells)
    names = sorted(names, key=CONTROLS.__contains__)  # floors before controls
    lines = [head, f"{'':<28}" + "".join(f"{name:>15}" for name in names)] if table else [head]
    for label, cells in table.items():
        values = "".join(f"{cells.get(name, '-'):>15}" for name in names)
        lines.append(f"{label[:28]:<28}{values}")
    if "mean_of_types" in summary:
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
