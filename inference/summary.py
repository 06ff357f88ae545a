"""From the answers' file of a test set to its figures: scores, floors, controls, comparisons.

A question whose video is missing counts as wrong, and `answered` stands beside it: the score of the
questions that could be asked. Memory holds numbers, not texts, of the questions of a benchmark.
"""

import json
from array import array
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from sys import intern

import numpy as np

from dataset import scoring
from inference import floors, metrics
from inference.test_set import read_answers

# The measure that stands for a benchmark where one figure is wanted: the first that it has.
HEADLINES = ("group", "likelihood", "CIDEr", "mean IoU", "exact match")
PAIR_CHANCES = {"text": 1 / 4, "video": 1 / 4, "group": 1 / 6}  # arXiv 2204.03162


class Questions:
    """The questions of one benchmark as columns: what they are, and a score for each way to measure
    them under each control (0 where one wasn't asked)."""

    def __init__(self):
        self.keys: list[tuple] = []  # what is the same question in another run
        self.clusters: list[str] = []  # its video, or its pair of videos
        self.videos: set[int] = set()  # hashes of their names
        self.types: list[str] = []
        self.subsets: list[tuple[str, ...]] = []
        self.missing = array("b")
        self.scores: dict[tuple[str, str], array] = {}  # (measure, control)
        self.parsed = array("b")  # whether a generated letter or text names an option
        # By the question's place, of those that have some:
        self.options: dict[int, tuple] = {}  # hashes of texts; the right one; the longest's score
        self.short_answers: dict[int, tuple[str, str]] = {}  # first words asked, the true answer
        self.captions: list[tuple[dict[str, str], list[str]]] = []  # by control; references
        self.groups: dict[str, dict] = defaultdict(dict)  # group → right option → its question
        self.pairs: Questions | None = None  # two videos and two captions as one question
        self.judged = 0  # answers that aren't scored here

    def add(self, line: dict, number: int) -> None:
        """A turn of a line of the answers' file."""
        turn, place = line["turns"][number], len(self.keys)
        entry = turn["scoring"]
        if entry["metric"] == "judge":
            self.judged += 1
            return
        self.keys.append(question_key(line, number))
        self.clusters.append(intern(entry.get("group") or " ".join(line["visuals"]) or line["id"]))
        self.videos.update(map(hash, line["visuals"]))
        self.types.append(intern(entry["type"]))
        self.subsets.append(tuple(map(intern, entry.get("subsets", ()))))
        self.missing.append(bool(line["missing"]) or entry["metric"] == "faulty")
        if not self.missing[-1]:
            for name, score in score_answer(turn).items():
                self.put(name, place, score)
            if (named := generated_choice(turn)) is not None:
                self.parsed.append(named >= 0)
        if entry["metric"] == "choice":
            options, right = entry["options"], entry["right"]
            texts = tuple(hash(scoring.normalise(text)) for text in options)
            self.options[place] = texts, right, floors.longest_option([options], [right])
            if "group" in entry:
                self.groups[entry["group"]][right] = self.keys[-1], turn["logprobs"]
        elif entry["metric"] == "match":
            start = intern(" ".join(turn["question"].lower().split()[:4]))
            self.short_answers[place] = start, intern(scoring.normalise(turn["answer"]))
        elif entry["metric"] == "cider":
            self.captions.append((turn["answers"], entry["references"]))

    def put(self, name: tuple[str, str], place: int, score: float) -> None:
        column = self.scores.setdefault(name, array("d"))
        column.extend([0.0] * (place + 1 - len(column)))
        column[place] = score

    def column(self, measure: str, control: str = "normal") -> np.ndarray:
        found = np.frombuffer(self.scores[measure, control])
        return np.pad(found, (0, len(self.keys) - len(found)))

    def score_together(self) -> None:
        """What can't be scored answer by answer: captions of a set, the two videos of a pair."""
        asked = [place for place, missing in enumerate(self.missing) if not missing]
        some = [caption for caption in self.captions if caption[0]]
        for control in some[0][0] if some else ():
            scores = metrics.cider([a[control] for a, _ in some], [true for _, true in some])
            for place, score in zip(asked, scores, strict=True):
                self.put(("CIDEr", control), place, score)
        for group, pair in self.groups.items():
            if len(pair) == 2:
                self.pairs = self.pairs or Questions()
                (key, first), (_, second) = pair[0], pair[1]
                self.pairs.keys.append(key)
                self.pairs.clusters.append(group)
                self.pairs.missing.append(not (first and second))
                for control in first.keys() & second.keys():
                    for name, score in metrics.two_by_two(first[control], second[control]).items():
                        self.pairs.put((name, control), len(self.pairs.keys) - 1, score)

    def headline(self) -> tuple[str | None, "Questions"]:
        """The measure that stands for the benchmark, and the questions or pairs that it scores."""
        for name in HEADLINES:
            for questions in (self.pairs, self):
                if questions and (name, "normal") in questions.scores:
                    return name, questions
        return None, self


def question_key(line: dict, number: int) -> tuple[str, int, int]:
    """The same in another run on the same data, and hardly ever in one on other data, whose ids may
    be the same."""
    turn = line["turns"][number]
    words = (turn["question"], turn["answer"], *line["visuals"])
    return line["id"], number, hash(words)


def score_answer(turn: dict) -> dict[tuple[str, str], float]:
    """(measure, control) → score of one turn. Captions are scored as a set, not here."""
    entry, answers = turn["scoring"], turn["answers"]
    found = {}
    if entry["metric"] == "choice":
        for control, sums in turn["logprobs"].items():
            blank = None if control == "no video" else turn["logprobs"].get("no video")
            for rule, place in metrics.best_option(sums, turn["tokens"], blank).items():
                found[rule, control] = float(place == entry["right"])
        if (place := generated_choice(turn)) is not None:
            kind = "generated letter" if "letter" in turn else "generated text"
            found[kind, "normal"] = float(place == entry["right"])
    elif entry["metric"] == "match":
        for control, text in answers.items():
            found["exact match", control] = float(scoring.exact_match(text, turn["answer"]))
            found["verbatim", control] = float(text == turn["answer"])
            found["token F1", control] = metrics.token_f1(text, turn["answer"])
    elif entry["metric"] == "span":
        for control, text in answers.items():
            iou = found["mean IoU", control] = metrics.interval_iou(text, entry["seconds"])
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


@dataclass
class Results:
    """What an answers' file holds."""

    benchmarks: dict[str, Questions] = field(default_factory=lambda: defaultdict(Questions))
    # Of questions that belong to none: records for `dataset.scoring.summarise`, by control.
    others: dict[str, list[dict]] = field(default_factory=lambda: defaultdict(list))
    asked: int = 0
    unasked: int = 0
    clips: set[int] = field(default_factory=set)  # hashes of their names
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
    for line in islice(read_answers(path), 1, None):
        if line["missing"]:
            results.unasked += 1
            results.left_out[" ".join(line["visuals"]) or line["where"]] = line["missing"]
        else:
            results.asked += 1
            results.clips.update(map(hash, line["visuals"]))
        for number, turn in enumerate(line["turns"]):
            entry = turn["scoring"]
            if "file" in entry:
                answer = turn["answers"].get("normal", "")
                results.submissions[entry["file"]].append((entry, answer))
            if "metric" in entry:
                results.benchmarks[entry.get("benchmark", "-")].add(line, number)
                continue
            about = {"visuals": line["visuals"], "question": turn["question"], "turn": number}
            about["key"], language = question_key(line, number), line["language"]
            for control, text in turn["answers"].items():
                score = scoring.score_turn(entry, language, text, turn["answer"], vocabulary)
                results.others[control].append(about | score)
    for questions in results.benchmarks.values():
        questions.score_together()
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
            _merge(content, _fill(entry["record"], answer))
        text = json.dumps(content, ensure_ascii=False, indent=4)
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in results.submissions]


def _fill(record: object, answer: object) -> object:
    if isinstance(record, dict):
        return {key: _fill(value, answer) for key, value in record.items()}
    if isinstance(record, list):
        return [_fill(value, answer) for value in record]
    return answer if record is None else record


def _merge(content: list | dict, more: list | dict) -> None:
    if isinstance(content, list):
        content += more
        return
    for key, value in more.items():
        if key in content:
            _merge(content[key], value)
        else:
            content[key] = value


# ------------------------------------------------------------------------------------- the figures


def summarise_answers(results: Results) -> dict:
    """All figures of an answers' file as fractions: `benchmarks` by name; of questions that belong
    to none `controls` (what `dataset.scoring.summarise` says) and the `interval` of their score."""
    result = {
        **{"samples": results.asked, "unasked": results.unasked, "clips": len(results.clips)},
        "left_out": results.left_out,
        "benchmarks": {name: summarise_questions(q) for name, q in results.benchmarks.items()},
        "controls": {name: scoring.summarise(some) for name, some in results.others.items()},
    }
    if graded := [r for r in results.others.get("normal", ()) if r["type"] != "caption"]:
        clips = [" ".join(r["visuals"]) for r in graded]
        result["interval"] = asdict(metrics.estimate([r["score"] for r in graded], clips))
    if "normal" in results.others:
        result["accuracy"] = result["controls"]["normal"]
    return result


def summarise_questions(questions: Questions) -> dict:
    """The figures of one benchmark."""
    result = {
        **{"questions": len(questions.keys), "videos": len(questions.videos)},
        **{"missing": sum(questions.missing), "judged": questions.judged, "rows": {}},
    }
    if not questions.keys:
        return result
    rows, (headline, _) = result["rows"], questions.headline()
    for some in filter(None, (questions.pairs, questions)):
        for measure in dict.fromkeys(measure for measure, _ in some.scores):
            rows[measure] = _row(some, measure, range(len(some.keys)))
    if questions.parsed:
        result["parsed"] = float(np.mean(questions.parsed))
    if (by := "likelihood" if headline == "group" else headline) in rows:
        places = defaultdict(list)
        for place, label in enumerate(questions.types):
            for name in (label, *(f"of {subset}" for subset in questions.subsets[place])):
                places[f"  {name}"].append(place)
        of_types = {f"  {label}" for label in questions.types}
        for name in sorted(places, key=lambda name: (name not in of_types, name)):
            rows[name] = _row(questions, by, places[name])
        result["mean_of_types"] = float(np.mean([rows[name]["score"] for name in of_types]))
    return result | {"headline": headline}


def _row(questions: Questions, measure: str, members: Sequence[int]) -> dict:
    """One line of the table: a measure of some of the questions, their floors and controls."""
    members = np.array(members)
    clusters = [questions.clusters[i] for i in members]
    scores = questions.column(measure)[members]
    asked = np.frombuffer(questions.missing, np.int8)[members] == 0
    row = asdict(metrics.estimate(scores, clusters, bounded=measure != "CIDEr"))
    row["answered"] = float(scores[asked].mean()) if asked.any() else None
    row["controls"] = {
        control: float(questions.column(name, control)[members].mean())
        for name, control in questions.scores
        if name == measure and control != "normal"
    }
    if measure in PAIR_CHANCES:
        row["floors"] = {"chance": PAIR_CHANCES[measure]}
    elif optional := [i for i in members if i in questions.options]:
        options, rights, longest = zip(*(questions.options[i] for i in optional), strict=True)
        clusters = [questions.clusters[i] for i in optional]
        row["floors"] = {
            "chance": floors.chance(options),
            "fixed letter": floors.fixed_letter(rights),
            "longest option": float(np.mean(longest)),
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
        found = asdict(metrics.compare(a, b, clusters))
        found["difference"] = found.pop("score")
        result[name] = {"ours": float(np.mean(a)), "theirs": float(np.mean(b)), **found}
    if not result:
        raise ValueError(
            "--against: those are answers to other questions (compared by id, video, question and "
            "true answer); ask both models the same test set"
        )
    return result


def _headline_scores(results: Results) -> dict[str, dict[tuple, tuple[float, str]]]:
    """test set → key of a question → (score, video)."""
    found = {}
    for name, questions in results.benchmarks.items():
        measure, some = questions.headline()
        if measure:
            scored = zip(some.column(measure), some.clusters, strict=True)
            found[name] = dict(zip(some.keys, scored, strict=True))
    if "normal" in results.others:
        found["questions"] = {
            r["key"]: (r["score"], " ".join(r["visuals"])) for r in results.others["normal"]
        }
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
    share = summary["missing"] / max(summary["questions"], 1)
    head = f"{name}: {summary['questions']:,} questions about {summary['videos']:,} videos"
    if summary["missing"]:
        head += f"; {summary['missing']:,} ({share:.1%}) COULD NOT BE ASKED and count as wrong"
    if summary["judged"]:
        head += f"; {summary['judged']:,} answers are for the benchmark's own judge"
    rows = summary["rows"]
    if not rows:
        return head
    floor_names = list(dict.fromkeys(key for row in rows.values() for key in row.get("floors", ())))
    control_names = list(rows[summary["headline"]]["controls"]) if summary["headline"] else []
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
