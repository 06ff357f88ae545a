"""The demo world's test set in the published forms of TVBench, VITATECS and Vinoground.

    python -m demo.export_benchmarks --data out/quickstart/data/test --out out/demo_benchmarks
    python -m scripts.convert.benchmarks tvbench --data_path out/demo_benchmarks/tvbench \\
        --images_path out/demo_benchmarks/videos --output out/demo_benchmarks/tvbench.jsonl

A question's options are its answers to a clip and to the same clip played backwards: without the
order of its frames nothing is left but chance. So the way from a published file to a score can be
checked with a model that knows the answers.
"""

import csv
import json
import os
import shutil
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from cli import Flags, flag, launch, parse_flags


@dataclass
class ExportFlags(Flags):
    """Export"""

    data: str = flag("out/quickstart/data/test", "folder of demo.world's test set")
    out: str = flag("out/demo_benchmarks", "folder to write")


def export(data: Path, out: Path) -> dict[str, int]:
    """Writes all three with their videos; returns how many questions or pairs each has."""
    files = [data / "questions.jsonl", data / "captions.jsonl"]
    lines = (line for file in files for line in file.read_text(encoding="utf-8").splitlines())
    pairs, captions = defaultdict(list), {}
    for line in map(json.loads, lines):
        turns = [turn["value"].removeprefix("<video>\n") for turn in line["conversations"]]
        scoring = line["scoring"][0]
        if len(turns) == 2 and "pair" in scoring:
            question = {"video": Path(line["video"]).name, "question": turns[0], "answer": turns[1]}
            pairs[scoring["pair"]].append((scoring["type"], question))
        if scoring["type"] == "caption" and line["language"] == "en":
            captions[Path(line["video"]).stem] = turns[1]

    tasks = defaultdict(list)
    for pair in pairs.values():
        answers = sorted({question["answer"] for _, question in pair})
        if len(answers) == 2:
            for task, question in pair:
                tasks[task].append(question | {"candidates": answers})
    for task, questions in tasks.items():
        _write(out / f"tvbench/json/{task}.json", json.dumps(questions, ensure_ascii=False))

    twins = [
        (name, f"{name}-reversed")
        for name, caption in captions.items()
        if captions.get(f"{name}-reversed", caption) != caption
    ]
    lines = [
        {
            **{"src_dataset": "clips", "video_name": f"{video}.mp4", "caption": captions[video]},
            **{"counterfactual": captions[other], "aspect": "Direction"},
        }
        for pair in twins
        for video, other in (pair, pair[::-1])
    ]
    _write(out / "vitatecs/data/Direction.jsonl", "\n".join(map(json.dumps, lines)) + "\n")

    path = out / "vinoground/vinoground.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["index", "pos_cap", "neg_cap", "major", "minor"])
        for index, pair in enumerate(twins):
            writer.writerow([index, *(captions[name] for name in pair), "demo", ""])
            for side, name in zip(("pos", "neg"), pair, strict=True):
                target = out / f"videos/vinoground_videos/{index}_{side}.mp4"
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(data / f"clips/{name}.mp4", target)
    shutil.copytree(data / "clips", out / "videos/clips", copy_function=os.link, dirs_exist_ok=True)
    questions = sum(map(len, tasks.values()))
    return {"tvbench": questions, "vitatecs": len(lines), "vinoground": len(twins)}


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    flags = parse_flags(ExportFlags, __doc__, argv)
    print(
        *(f"{name}: {count:,}" for name, count in export(Path(flags.data), Path(flags.out)).items())
    )


if __name__ == "__main__":
    launch(main)
