"""The field's video benchmarks, as published, into test sets for `eval.py`: a subcommand each.

    python -m scripts.convert.benchmarks tvbench --data_path TVBench --images_path TVBench/video \\
        --output out/tvbench.jsonl
    python eval.py --data_path out/tvbench.jsonl --images_path TVBench/video --controls \\
        --output out/tvbench/eval.json

`--data_path` is the folder of the annotations under their published names; what each benchmark
measures and where to get it: docs/benchmarks.md. None ships with this repository.

A question whose video isn't under `--images_path` stays in the output with `"missing": true`, so
that it stays in the denominator; the share is reported, and `<output>.missing.txt` lists the files.
A record that can't be used ends the conversion, or counts as wrong with `--keep_faulty`, as in the
published scorers: a score on the rest of a benchmark isn't its score.

A line's `scoring` tells eval.py what to do: `metric` is `choice` (`options`, and the place of the
`right` one), `match` (the true answer of the conversation), `cider` (`references`), `span`
(`seconds`), `judge` (not scored here) or `faulty` (never asked, always wrong). `type` and `subsets`
are reported apart; `group` ties lines that count only together. An answer that the benchmark's own
judge scores is written to `file` as `record`, in place of null; of `options` the one of `labels`.
"""

import csv
import hashlib
import inspect
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

from cli import Flags, flag, launch, parse_flags
from dataset.samples import parse_sample
from dataset.video import VIDEO_SUFFIXES
from files import whole_file
from inference.metrics import LETTERS
from scripts.convert.common import read_records
from scripts.convert.media import Media

MAX_REPORTED = 10  # bad records in one message
DESCRIBE = "Describe the video."
CAPTION = {"en": "Describe this video in one sentence.", "zh": "用一句话描述这个视频。"}
WHICH_CAPTION = "Which caption fits the video?"


# A line of the output, before its video is looked for; and where that may be under --images_path.
Question = tuple[dict, list[str]]


def ask(videos: list[str], text: str, answer: str, scoring: dict, language="en") -> Question:
    turns = (("human", "<video>\n" * bool(videos) + text), ("gpt", answer))
    line = {"language": language, "video": videos[0]} if videos else {"language": language}
    line["conversations"] = [{"from": who, "value": said} for who, said in turns]
    return line | {"scoring": [scoring]}, videos


def checked(options: object) -> list[str]:
    if not isinstance(options, list) or not options:
        raise ValueError("its list of options is empty")
    options = [str(option).strip() for option in options]
    if not all(options):
        raise ValueError("one of its options is empty")
    return options


def choose(
    videos: list[str], text: str, options: object, right: int | str, kind: str, **more
) -> Question:
    """A question with options; right: the place of the right one, from 0, or its text.

    Raises ValueError where there are no options, or none of them is right.
    """
    options = checked(options)
    if isinstance(right, str):
        if right.strip() not in options:
            raise ValueError(f"its answer {right!r} isn't one of its options {options}")
        right = options.index(right.strip())
    if not 0 <= right < len(options):
        raise ValueError(f"its answer is number {right}, its options are 0 to {len(options) - 1}")
    scoring = {"metric": "choice", "type": kind, "options": options, "right": right, **more}
    return ask(videos, text.strip(), options[right], scoring)


def submit(
    videos: list[str], text: str, kind: str, file: str, record: object, answer: str = "-", **more
) -> Question:
    """A question that only the benchmark's own judge or server can score."""
    scoring = {"metric": "judge", "type": kind, "file": file, "record": record, **more}
    return ask(videos, text, answer, scoring)


def stems(name: str) -> list[str]:
    """Files of this name with any suffix of a video."""
    return [name + suffix for suffix in VIDEO_SUFFIXES]


# ------------------------------------------------------------------------------- the benchmarks
# Each takes a record (with `file`, the stem of the file's name, and `place`, its line, number or
# key there) and the folder, and yields questions. ValueError says what is wrong with a record.


def tvbench(record: dict, folder: Path) -> Iterator[Question]:
    """json/<task>.json; videos in <task>/."""
    yield _candidates(record, f"{record['file']}/{record['video']}")


MVBENCH_FOLDERS = {
    "star/Charades_v1_480": "object_interaction action_sequence action_prediction",
    "sta/sta_video": "action_localization",
    "clevrer/video_validation": "moving_count moving_direction moving_attribute "
    "counterfactual_inference object_existence",
    "nturgbd": "fine_grained_pose",
    "perception/videos": "character_order object_shuffle state_change action_count",
    "vlnqa": "egocentric_navigation",
    "tvqa/frames_fps3_hq": "episodic_reasoning",
    "Moments_in_Time_Raw/videos": "fine_grained_action",
    "scene_qa/video": "scene_transition",
    "ssv2_video": "action_antonym",
    "FunQA_test/test": "unexpected_action",
}
MVBENCH_ROOTS = {task: root for root, tasks in MVBENCH_FOLDERS.items() for task in tasks.split()}


def mvbench(record: dict, folder: Path) -> Iterator[Question]:
    """json/<task>.json; videos in the folders of its own release.

    Episodic reasoning comes as folders of frames: make them videos
    (ffmpeg -framerate 3 -i NAME/%05d.jpg NAME.mp4)."""
    task, video = record["file"], record["video"]
    suffix = ".mp4" if task == "episodic_reasoning" else ""
    yield _candidates(record, str(PurePosixPath(MVBENCH_ROOTS.get(task, ""), f"{video}{suffix}")))


def _candidates(record: dict, video: str) -> Question:
    """MVBench's form; `start` and `end` where the question is about that part only."""
    answer, start, end = str(record["answer"]), record.get("start"), record.get("end")
    line, videos = choose([video], record["question"], record["candidates"], answer, record["file"])
    if start is not None and end is not None:
        line |= {"start": float(start), "end": float(end)}
    return line, videos


def vitatecs(record: dict, folder: Path) -> Iterator[Question]:
    """<aspect>.jsonl: a true caption and a false one; videos in MSRVTT/ and VATEX/."""
    true, false = record["caption"], record["counterfactual"]
    source = record["src_dataset"]
    # An order that depends on the texts alone: else the first would always be right.
    digest = hashlib.blake2b(f"{true}{false}".encode(), digest_size=1).digest()
    options = [true, false] if digest[0] % 2 else [false, true]
    more = {"subsets": [source], "letters": WHICH_CAPTION}
    videos = [f"{source}/{record['video_name']}"]
    yield choose(videos, DESCRIBE, options, true, record["aspect"], **more)


def vinoground(record: dict, folder: Path) -> Iterator[Question]:
    """vinoground.csv: two captions and two videos a line, so four likelihoods."""
    index, captions = record["index"], [record["pos_cap"], record["neg_cap"]]
    subsets = [record["major"], *filter(None, (record["minor"] or "").split(";"))]
    more = {"subsets": subsets, "letters": WHICH_CAPTION, "group": index}
    for right, side in enumerate(("pos", "neg")):
        videos = [f"vinoground_videos/{index}_{side}.mp4"]
        yield choose(videos, DESCRIBE, captions, right, "caption", **more)


def tempcompass(record: dict, folder: Path) -> Iterator[Question]:
    """questions/{multi-choice,yes_no,caption_matching,captioning}.json."""
    task, (video, aspect, _), videos = record["file"], record["place"], stems(record["place"][0])
    text, answer = record["question"], record["answer"].strip()
    if task == "captioning":
        item = {k: v for k, v in record.items() if k not in ("file", "place")}
        record = {video: {aspect: [item | {"prediction": None}]}}
        yield submit(videos, text, task, "captioning.json", record, answer)
        return
    options = ["yes", "no"]
    if task != "yes_no":
        text, *lines = (line.strip() for line in text.split("\n"))
        label = r"^(?:Option|Sentence|Caption) [12AB]:\s*|^[A-D][.)]?\s+"
        options = [re.sub(label, "", line) for line in lines]
        if answer in lines:
            answer = options[lines.index(answer)]
    yield choose(videos, text, options, answer, task, subsets=[aspect])


def nextqa(record: dict, folder: Path) -> Iterator[Question]:
    """val.csv; and atp-hard-ct4.txt, where it is there: what one frame doesn't answer
    (arXiv 2206.01720)."""
    text, options = record["question"].strip(" ?") + "?", [record[f"a{i}"] for i in range(5)]
    # The authors' own evaluation counts questions about what came before (TP) as TN.
    kind = {"TP": "TN"}.get(record["type"], record["type"])
    # Published elsewhere; its rows are counted from 0, lines from 1, and the first is the header.
    hard = _beside(folder, "atp-hard-ct4.txt", needed=False) if record["file"] == "val" else {}
    subsets = [kind[0], *["atp_hard"] * (str(record["place"] - 2) in hard)]
    right = int(record["answer"])
    yield choose(stems(record["video"]), text, options, right, kind, subsets=subsets)


def egoschema(record: dict, folder: Path) -> Iterator[Question]:
    """questions.json and subset_answers.json: the 500 questions with public answers."""
    name, answers = record["q_uid"], _beside(folder, "subset_answers.json")
    if name in answers:
        options = [record[f"option {i}"] for i in range(5)]
        yield choose(stems(name), record["question"], options, answers[name], "all")


def egoschema_full(record: dict, folder: Path) -> Iterator[Question]:
    """questions.json: all 5,031, for its server or Kaggle."""
    name, options = record["q_uid"], checked([record[f"option {i}"] for i in range(5)])
    more = {"options": options, "labels": list(range(5))}
    yield submit(stems(name), record["question"], "all", "egoschema.json", {name: None}, **more)


def videomme(record: dict, folder: Path) -> Iterator[Question]:
    """The parquet of 2,700 questions; videos are named after `videoID`."""
    options = [re.sub(r"^[A-D]\.\s*", "", option) for option in record["options"]]
    right = LETTERS.find(record["answer"]) if record["answer"] else -1
    subsets = [record["duration"], record["domain"]]
    videos, kind = stems(record["videoID"]), record["task_type"]
    yield choose(videos, record["question"], options, right, kind, subsets=subsets)


def mlvu(record: dict, folder: Path) -> Iterator[Question]:
    """json/1_plotQA.json … 9_summary.json; the last two need a judge."""
    video, text, answer = record["video"], record["question"], str(record["answer"])
    videos = [f"{record['file']}/{video}", f"{record['file'].partition('_')[2]}/{video}", video]
    kind = record["question_type"]
    if kind in ("subPlot", "summary"):
        about = {"video_name": PurePosixPath(video).name, "Q": text, "A": answer, "pred": None}
        yield submit(videos, text, kind, f"{kind.lower()}_all.json", [about], answer)
    else:
        yield choose(videos, text, record["candidates"], answer, kind)


def longvideobench(record: dict, folder: Path) -> Iterator[Question]:
    """lvb_val.json; subtitles aren't used."""
    subsets, kind = [f"{record['duration_group']} s"], record["question_category"]
    about = [record["video_path"]], record["question"], record["candidates"]
    yield choose(*about, record["correct_choice"], kind, subsets=subsets)


def longvideobench_test(record: dict, folder: Path) -> Iterator[Question]:
    """lvb_test_wo_gt.json: for its leaderboard."""
    more = {"options": checked(record["candidates"]), "labels": list(LETTERS)}
    about = [record["video_path"]], record["question"], record["question_category"]
    yield submit(*about, "longvideobench_test.json", {record["id"]: None}, **more)


def msvd_qa(record: dict, folder: Path) -> Iterator[Question]:
    """test_qa.json, and youtube_mapping.txt (`name vid1` a line), which names the videos."""
    names, key = _beside(folder, "youtube_mapping.txt"), f"vid{record['video_id']}"
    if key not in names:
        raise ValueError(f"youtube_mapping.txt doesn't name {key}")
    yield _short_answer(record, names[key], record["question"].split()[0])


def msrvtt_qa(record: dict, folder: Path) -> Iterator[Question]:
    """test_qa.json."""
    yield _short_answer(record, f"video{record['video_id']}", record["question"].split()[0])


ACTIVITYNET_TYPES = ["motion", "spatial", "temporal", "yes/no", "colour", "object", "location"]
ACTIVITYNET_TYPES += ["number", "other"]


def activitynet_qa(record: dict, folder: Path) -> Iterator[Question]:
    """test_q.json and test_a.json."""
    file, key = f"{record['file'].removesuffix('_q')}_a.json", record["question_id"]
    answer = _beside(folder, file).get(key)
    if answer is None:
        raise ValueError(f"{file} has no answer to {key}")
    if not 0 <= answer["type"] < len(ACTIVITYNET_TYPES):
        raise ValueError(f"the type {answer['type']} of its answer isn't 0 to 8")
    kind = ACTIVITYNET_TYPES[answer["type"]]
    yield _short_answer(record | answer, f"v_{record['video_name']}", kind)


def _short_answer(record: dict, video: str, kind: str) -> Question:
    text = record["question"].strip(" ?") + "?"
    scoring = {"metric": "match", "type": kind}
    return ask(stems(video), text, str(record["answer"]), scoring)


def vatex_en(record: dict, folder: Path) -> Iterator[Question]:
    """vatex_public_test_english_v1.1.json: ten captions a video."""
    yield _captions(record["videoID"], record["enCap"], "en")


def vatex_zh(record: dict, folder: Path) -> Iterator[Question]:
    """vatex_validation_v1.0.json: ten captions a video."""
    yield _captions(record["videoID"], record["chCap"], "zh")


def _captions(video: str, captions: list[str], language: str) -> Question:
    if not isinstance(captions, list) or not captions or not all(captions):
        raise ValueError("its list of captions is empty, or one of them is")
    scoring = {"metric": "cider", "type": "captions", "references": captions}
    return ask(stems(video), CAPTION[language], captions[0], scoring, language)


def charades_sta(record: dict, folder: Path) -> Iterator[Question]:
    """charades_sta_test.txt: `video start end##sentence.` a line, in seconds."""
    match = re.fullmatch(r"(\S+) ([\d.]+) ([\d.]+)##(.+)", record["line"].strip())
    if match is None:
        raise ValueError("it isn't `video start end##sentence`")
    start, end, sentence = float(match[2]), float(match[3]), match[4].strip(" .")
    if not start < end:
        raise ValueError(f"it ends at {end} s, but starts at {start} s")
    text = f'When does this happen: "{sentence}"? Give its start and end in seconds.'
    scoring = {"metric": "span", "type": "span", "seconds": [start, end]}
    yield ask(stems(match[1]), text, f"{start} - {end}", scoring)


# The files that hold the questions: the first of these patterns that some file fits.
PATTERNS = {
    tvbench: ("json/*.json", "*.json"),
    vitatecs: ("data/*.jsonl", "*.jsonl"),
    vinoground: ("vinoground.csv",),
    tempcompass: ("questions/*.json",),
    nextqa: ("{split}.csv",),
    egoschema: ("questions.json",),
    egoschema_full: ("questions.json",),
    msvd_qa: ("{split}_qa.json",),
    msrvtt_qa: ("{split}_qa.json",),
    activitynet_qa: ("{split}_q.json",),
    vatex_en: ("vatex_public_test_english_v1.1.json",),
    vatex_zh: ("vatex_validation_v1.0.json",),
    charades_sta: ("charades_sta_{split}.txt",),
    mvbench: ("json/*.json", "*.json"),
    videomme: ("*.parquet",),
    mlvu: ("[1-9]_*.json",),
    longvideobench: ("lvb_val.json",),
    longvideobench_test: ("lvb_test_wo_gt.json",),
}
BENCHMARKS = {function.__name__: function for function in PATTERNS}


# ------------------------------------------------------------------------------------- the files


def find_files(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    """The files that fit the first pattern which some file fits; ValueError if there are none."""
    for pattern in patterns:
        if paths := sorted(folder.rglob(pattern)):
            return paths
    raise ValueError(f"there is no {' or '.join(patterns)} in {folder}: download it there")


def read_published(path: Path) -> Iterator[tuple[str, dict]]:
    """(where it stands, record) of a published file; ValueError names the file if it is broken."""
    if path.suffix == ".csv":
        lines = path.read_text(encoding="utf-8-sig").splitlines(keepends=True)
        numbered = enumerate(csv.DictReader(lines), 2)
    elif path.suffix == ".txt":
        lines = enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1)
        numbered = ((number, {"line": line}) for number, line in lines if line.strip())
    elif path.suffix != ".json":
        numbered = read_records(path)
    elif isinstance(content := _read_json(path), list):
        numbered = enumerate(content, 1)
    else:  # TempCompass: {video: {aspect: [question, …]}}
        numbered = [
            ((video, aspect, number), item)
            for video, aspects in content.items()
            if isinstance(aspects, dict)
            for aspect, items in aspects.items()
            if isinstance(items, list)
            for number, item in enumerate(items, 1)
        ]
    for place, record in numbered:
        where = f"{path}:{' '.join(map(str, place)) if isinstance(place, tuple) else place}"
        if not isinstance(record, dict):
            reason = record if isinstance(record, ValueError) else "not a JSON object"
            raise ValueError(f"{where}: {reason}; download it again")
        yield where, record | {"file": path.stem, "place": place}


def _read_json(path: Path) -> dict | list:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); download it again") from error


@lru_cache(maxsize=4)
def _beside(folder: Path, name: str, needed: bool = True) -> dict:
    """What a file that goes with the questions holds: a JSON object, a list of answers by their
    question_id, or the first word of each line by the last."""
    if not needed and not any(folder.rglob(name)):
        return {}
    (path, *_) = find_files(folder, (name,))
    if path.suffix == ".txt":
        lines = map(str.split, path.read_text(encoding="utf-8-sig").splitlines())
        return {words[-1]: words[0] for words in lines if words}
    content = _read_json(path)
    return {a["question_id"]: a for a in content} if isinstance(content, list) else content


# ------------------------------------------------------------------------------------- the command


def convert(name: str, flags: "BenchmarkFlags") -> str:
    """Writes the benchmark `name` as jsonl; returns a report in words.

    Raises ValueError that lists the first records that can't be used with file, line, reason and
    fix, unless they are kept as lines that count as wrong (--keep_faulty)."""
    folder, output, media = Path(flags.data_path), Path(flags.output), Media(flags.images_path)
    benchmark = BENCHMARKS[name]
    split = flags.split or ("val" if name == "nextqa" else "test")
    paths = find_files(folder, tuple(p.format(split=split) for p in PATTERNS[benchmark]))
    count, absent, missing, problems = 0, 0, {}, []

    def asked() -> Iterator[Question]:
        for where, record in (pair for path in paths for pair in read_published(path)):
            try:
                for line, videos in benchmark(record, folder):
                    parse_sample(line, 0, "")
                    yield line, videos
            except (KeyError, ValueError, TypeError, AttributeError) as error:
                reason = f"the key {error} is missing" if isinstance(error, KeyError) else error
                problems.append(f"{where}: {reason}")
                yield ask([], problems[-1], "-", {"metric": "faulty", "type": "faulty"})

    output.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(output) as file:
        for count, (line, videos) in enumerate(asked(), 1):
            line = {"id": f"{name}-{count}", **line}
            line["scoring"] = [{"benchmark": name, **line["scoring"][0]}]
            try:
                if videos:
                    line["video"] = media.find(*videos)
            except ValueError as error:
                line["missing"] = True
                absent += 1
                missing.setdefault(line["video"], str(error))
            file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        some = "\n".join(problems[:MAX_REPORTED])
        if problems and not flags.keep_faulty:
            raise ValueError(
                f"{some}\n{len(problems)} of the records of {name} can't be used: download the "
                "annotations again, correct these, or count them as wrong (--keep_faulty)"
            )
        if not count:
            raise ValueError(f"{folder}: no question of {name}; see docs/benchmarks.md")
    lines = [f"{output}: {count:,} questions of {name}"]
    if problems:
        lines += [f"{some}\n{len(problems)} records can't be used: they count as wrong."]
    listed = output.with_suffix(".missing.txt")
    listed.unlink(missing_ok=True)
    if missing:
        listed.write_text("".join(f"{v}\t{why}\n" for v, why in missing.items()), encoding="utf-8")
        lines.append(
            f"MISSING: {len(missing):,} videos of {absent:,} questions ({absent / count:.1%}), "
            f"listed in {listed}. They stay in the file and count as not answered."
        )
    root = flags.images_path or "FOLDER_OF_THE_VIDEOS"
    lines.append(
        f"next: python eval.py --data_path {output} --images_path {root} --controls --output "
        f"out/{name}/eval.json"
    )
    return "\n".join(lines)


@dataclass
class BenchmarkFlags(Flags):
    """Benchmark"""

    data_path: str | None = flag(None, "folder of the published annotations", "--source")
    images_path: str | None = flag(
        None, "folder of its videos (default: they aren't looked for)", "--videos"
    )
    split: str | None = flag(
        None, "val or test, where both are published (default: test; NExT-QA: val)"
    )
    keep_faulty: bool = flag(False, "records that can't be used count as wrong, and don't stop it")
    output: str | None = flag(None, "jsonl to write")

    def problems(self) -> list[str]:
        found = super().problems()
        if self.data_path is None or not Path(self.data_path).is_dir():
            found.append(f"--data_path {self.data_path}: name the folder of the annotations")
        if self.images_path is not None and not Path(self.images_path).is_dir():
            found.append(f"--images_path {self.images_path}: no such folder")
        if not (self.output or "").endswith(".jsonl"):
            found.append("--output must be a name that ends in .jsonl")
        return found


def main(argv: list[str] | None = None) -> None:
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        first = {key: inspect.getdoc(f).splitlines()[0] for key, f in BENCHMARKS.items()}
        names = "\n".join(f"    {key:<20}{files}" for key, files in first.items())
        print(f"{__doc__}\nBenchmarks, and the files of each:\n{names}")
        return
    if name not in BENCHMARKS:
        raise ValueError(f"no benchmark {name!r}: choose one of {', '.join(BENCHMARKS)}")
    print(convert(name, parse_flags(BenchmarkFlags, BENCHMARKS[name].__doc__, rest)))


if __name__ == "__main__":
    launch(main)
