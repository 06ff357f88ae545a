"""The demo world's test set in the published forms of TVBench, VITATECS and Vinoground.

    python -m demo.export_benchmarks --data out/quickstart/data/test --out out/demo_benchmarks
    python -m scripts.convert.benchmarks tvbench --data_path out/demo_benchmarks/tvbench \\
        --images_path out/demo_benchmarks/videos --output out/demo_benchmarks/tvbench.jsonl

A question's options are its answers to a clip and to the same clip played backwards: without the
order of its frames nothing is left but chance. So the way from a published file to a score can be
checked with a model that knows the answers.
"""

import csv
import io
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

    data: Path = flag(Path("out/quickstart/data/test"), "folder of demo.world's test set")
    out: Path = flag(Path("out/demo_benchmarks"), "folder to write")


def export(data: Path, out: Path) -> dict[str, int]:
    """Writes all three with their videos; returns how many questions or pairs each has."""
    pairs, captions = defaultdict(list), {}
    for name in ("questions", "captions"):
        for line in map(json.loads, (data / f"{name}.jsonl").read_text("utf-8").splitlines()):
            turns = [turn["value"].removeprefix("<video>\n") for turn in line["conversations"]]
            scoring, file = line["scoring"][0], Path(line["video"])
            if len(turns) == 2 and "pair" in scoring:
                question = {"video": file.name, "question": turns[0], "answer": turns[1]}
                pairs[scoring["pair"]].append((scoring["type"], question))
            if scoring["type"] == "caption" and line["language"] == "en":
                captions[file.stem] = turns[1]

    tasks = defaultdict(list)
    for pair in pairs.values():
        answers = sorted({question["answer"] for _, question in pair})
        if len(answers) == 2:
            for task, question in pair:
                tasks[task].append(question | {"candidates": answers})
    for task, questions in tasks.items():
        _write(out / f"tvbench/json/{task}.json", json.dumps(questions, ensure_ascii=False))

    twins, reverses, clips = [], [], out / "videos/clips"
    shutil.copytree(data / "clips", clips, copy_function=os.link, dirs_exist_ok=True)
    for name, caption in captions.items():
        twin = captions.get(f"{name}-reversed", caption)
        if twin == caption:
            continue
        for side, video in (("pos", name), ("neg", f"{name}-reversed")):
            target = out / f"videos/vinoground_videos/{len(twins)}_{side}.mp4"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(clips / f"{video}.mp4", target)
            texts = (caption, twin) if side == "pos" else (twin, caption)
            about = {"src_dataset": "clips", "video_name": f"{video}.mp4", "caption": texts[0]}
            reverses.append(about | {"counterfactual": texts[1], "aspect": "Direction"})
        twins.append([len(twins), caption, twin, "demo", ""])
    _write(out / "vitatecs/data/Direction.jsonl", "\n".join(map(json.dumps, reverses)) + "\n")
    table = io.StringIO(newline="")
    csv.writer(table).writerows([["index", "pos_cap", "neg_cap", "major", "minor"], *twins])
    _write(out / "vinoground/vinoground.csv", table.getvalue())
    questions = sum(map(len, tasks.values()))
    return {"tvbench": questions, "vitatecs": len(reverses), "vinoground": len(twins)}


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="")


def main(argv: list[str] | None = None) -> None:
    flags = parse_flags(ExportFlags, __doc__, argv)
    print(export(flags.data, flags.out))


if __name__ == "__main__":
    launch(main)
