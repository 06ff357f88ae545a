"""Write report.md about a finished quickstart: scores, what each stage cost, curves, test frames.

    python -m demo.report --dir out/quickstart

Reads eval.json and eval.answers.jsonl (eval.py), stages/*.json (quickstart.sh) and */metrics.jsonl
(training) in --dir, and the test clips. Computes nothing again, so the report can't differ from
what was measured.
"""

import json
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from matplotlib.figure import Figure

from cli import Flags, flag, launch, parse_flags
from dataset.video import read_frames
from inference.scoring import format_table
from inference.summary import read_results
from trainer.logger import draw_curves, read_rows

ROWS = 8  # of frames in test_frames.png


def draw_answers(answers: list[dict], root: Path, num_frames: int, path: Path) -> None:
    """A row of frames for some of the English answers, each about another clip (few machines have a
    Chinese font): above it question, answer and, if that is wrong, truth."""
    english = [a for a in answers if (a["question"] + a["answer"] + a["prediction"]).isascii()]
    by_clip = [*{a["visuals"][0]: a for a in english if a["turn"] == 0}.items()]
    picked = by_clip[:: max(1, len(by_clip) // ROWS)][:ROWS]
    rows, width = max(1, len(picked)), 1.4 * num_frames
    figure = Figure(figsize=(width, 1.9 * rows))
    axes = figure.subplots(rows, num_frames, squeeze=False)
    edge = 0.1 / width
    figure.subplots_adjust(edge, 0.02, 1 - edge, 1 - 0.25 / rows, wspace=0.05, hspace=0.3)
    for axis in axes.flat:
        axis.axis("off")
    # Not strict: an empty row stands where nothing was answered, and short clips have fewer frames.
    for row, (file, answer) in zip(axes, picked, strict=False):
        for axis, frame in zip(row, read_frames(root / file, num_frames).frames, strict=False):
            axis.imshow(frame)
        text, colour = f"{answer['question']}\n→ {answer['prediction']}", "black"
        if answer["score"] != 1:
            text, colour = f"{text}   (true: {answer['answer']})", "firebrick"
        row[0].set_title(text, loc="left", fontsize=9, color=colour)
    figure.savefig(path, dpi=100)


def as_markdown(evaluation: dict, stages: dict[str, dict]) -> str:
    """The report's text. stages: seconds and CPU-seconds (user + system) by name."""
    accuracy = evaluation["accuracy"]

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f} %"

    cost = {name: (s["seconds"], s["user"] + s["system"]) for name, s in stages.items()}
    cost["**all**"] = tuple(map(sum, zip(*cost.values(), strict=True))) or (0, 0)
    packages = ("torch", "transformers", "tokenizers", "av", "numpy")
    versions = [f"{package} {version(package)}" for package in packages]
    parameters = ", ".join(f"{name} {n:,}" for name, n in evaluation["parameters"].items())
    costs = "\n".join(f"| {name} | {wall:.0f} | {cpu:.0f} |" for name, (wall, cpu) in cost.items())
    counts = accuracy["counts"]
    return f"""# What came out

{evaluation["clips"]} test clips, {counts["questions"]} questions and {counts["captions"]} \
captions, answered by greedy generation.

- all questions: **{percent(accuracy["all"])}**
- reversed pairs (the clip and its reverse both right): **{percent(accuracy["reversed"])}** \
of {counts["pairs"]}
- facts of captions: **{percent(accuracy["captions"])}**

In percent; `majority` is what the most common answer of each type would score:

```
{format_table(evaluation["controls"])}
```

![test frames](test_frames.png)

![loss](loss_curves.png)

| stage | seconds | CPU-seconds |
|---|--:|--:|
{costs}

Parameters: {parameters}.
Versions: Python {platform.python_version()}, {", ".join(versions)}.
"""


@dataclass
class ReportFlags(Flags):
    """Report"""

    dir: Path = flag(Path("out/quickstart"), "folder of the run; the report is written into it")


def main() -> None:
    folder = parse_flags(ReportFlags, __doc__).dir
    if not (folder / "eval.json").is_file():
        raise ValueError(f"no {folder}/eval.json: python eval.py --data_path … --output writes it")
    evaluation = json.loads((folder / "eval.json").read_text(encoding="utf-8"))

    def in_order(pattern: str) -> list[Path]:
        return sorted(folder.glob(pattern), key=lambda file: file.stat().st_mtime)

    stages = {file.stem: json.loads(file.read_text()) for file in in_order("stages/*.json")}
    curves = {file.parent.name: read_rows(file) for file in in_order("*/metrics.jsonl")}
    if curves:
        draw_curves(curves, folder / "loss_curves.png")
    root, frames = Path(evaluation["images_path"]), folder / "test_frames.png"
    answers = read_results(folder / "eval.answers.jsonl").others["normal"]
    draw_answers(answers, root, evaluation["num_frames"], frames)
    (folder / "report.md").write_text(as_markdown(evaluation, stages), encoding="utf-8")
    print(f"{folder}/report.md: {len(stages)} stages, {evaluation['clips']} clips")


if __name__ == "__main__":
    launch(main)
