"""Gathers what a run left behind into report.md, report.json and two pictures.

    python -m scripts.report --dir out/quickstart --images_path out/quickstart/data/test

Reads eval.json (eval.py), stages.json (run_stage.py) and */metrics.jsonl (training) in --dir, and
the test clips. Computes nothing anew, so the report can't differ from what was measured.
"""

import argparse
import json
import platform
from importlib.metadata import version
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt
from matplotlib import font_manager

from dataset.scoring import format_table
from dataset.video import read_frames
from trainer.logger import draw_curves, read_rows

PACKAGES = ("torch", "transformers", "tokenizers", "av", "numpy")
CJK_FONTS = ("Noto Sans CJK SC", "Noto Sans SC", "WenQuanYi Zen Hei", "PingFang SC", "SimHei")


def read_json(path: Path, maker: str):
    if not path.is_file():
        raise ValueError(f"no {path}: made by {maker}")
    return json.loads(path.read_text(encoding="utf-8"))


def read_curves(folder: Path) -> dict[str, list[dict]]:
    """Lines of metrics.jsonl by run, in the order in which the runs were made."""
    files = sorted(folder.glob("*/metrics.jsonl"), key=lambda file: file.stat().st_mtime)
    return {file.parent.name: read_rows(file) for file in files}


def choose_answers(answers: list[dict], count: int) -> list[dict]:
    """One answer of each type in turn, about clips not shown yet; no Chinese without its font."""
    fonts = {font.name for font in font_manager.fontManager.ttflist}
    cjk = next((font for font in CJK_FONTS if font in fonts), None)
    if cjk:
        plt.rcParams["font.family"] = [cjk, "DejaVu Sans"]
    else:
        answers = [a for a in answers if (a["question"] + a["answer"] + a["prediction"]).isascii()]
    waiting = [a for a in answers if len(a["visuals"]) == 1 and a["turn"] == 0]
    chosen, types, clips = [], {}, set()
    while waiting and len(chosen) < count:
        best = min(waiting, key=lambda a: (a["visuals"][0] in clips, types.get(a["type"], 0)))
        chosen.append(best)
        waiting.remove(best)
        clips.add(best["visuals"][0])
        types[best["type"]] = types.get(best["type"], 0) + 1
    return chosen


def draw_answers(answers: list[dict], root: Path, num_frames: int, path: Path) -> None:
    """A row of frames for each answer; above it question, answer and, if that is wrong, truth."""
    rows, width = max(1, len(answers)), 1.4 * num_frames
    figure, axes = plt.subplots(rows, num_frames, figsize=(width, 1.9 * rows), squeeze=False)
    edge = 0.1 / width
    figure.subplots_adjust(edge, 0.02, 1 - edge, 1 - 0.25 / rows, wspace=0.05, hspace=0.3)
    for axis in axes.flat:
        axis.axis("off")
    # Not strict: an empty row stands where nothing was answered.
    for row, answer in zip(axes, answers, strict=False):
        frames = read_frames(root / answer["visuals"][0], num_frames=num_frames).frames
        for axis, frame in zip(row, frames, strict=False):  # short clips have fewer frames
            axis.imshow(frame)
        right = answer["score"] == 1
        truth = "" if right else f"   (true: {answer['answer']})"
        text = f"{answer['question']}\n→ {answer['prediction']}{truth}"
        row[0].set_title(text, loc="left", fontsize=9, color="black" if right else "firebrick")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def write_markdown(report: dict, path: Path) -> None:
    accuracy, stages = report["accuracy"], report["stages"]

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f} %"

    lines = [
        "# What came out",
        "",
        f"{report['clips']} test clips, {accuracy['counts']['questions']} questions and "
        f"{accuracy['counts']['captions']} captions, answered by greedy generation.",
        "",
        f"- all questions: **{percent(accuracy['all'])}**",
        f"- reversed pairs (the clip and its reverse both right): "
        f"**{percent(accuracy['reversed'])}** of {accuracy['counts']['pairs']}",
        f"- facts of captions: **{percent(accuracy['captions'])}**",
        "",
        "In percent; `majority` is what the most common answer of each type would score:",
        "",
        "```",
        format_table(report["controls"]),
        "```",
        "",
        "![test frames](test_frames.png)",
        "",
        "![loss](loss_curves.png)",
        "",
        "## Cost",
        "",
        "| stage | seconds | CPU-seconds | peak memory, MB |",
        "|---|--:|--:|--:|",
    ]
    for name, stage in stages.items():
        figures = f"{stage['seconds']:.0f} | {stage['cpu_seconds']:.0f} | {stage['peak_memory_mb']}"
        lines.append(f"| {name} | {figures} |")
    seconds = sum(stage["seconds"] for stage in stages.values())
    cpu_seconds = sum(stage["cpu_seconds"] for stage in stages.values())
    peak = max((stage["peak_memory_mb"] for stage in stages.values()), default=0)
    lines += [
        f"| **all** | **{seconds:.0f}** | **{cpu_seconds:.0f}** | **{peak}** |",
        "",
        "## Parameters",
        "",
        *(f"- {part}: {number:,}" for part, number in report["parameters"].items()),
        "",
        "## Versions",
        "",
        *(f"- {name} {number}" for name, number in report["versions"].items()),
        "",
    ]
    path.write_text("\n".join(lines), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the report of a run.")
    parser.add_argument("--dir", type=Path, default=Path("out/quickstart"))
    parser.add_argument("--images_path", type=Path, help="root of the test clips, for the figure")
    parser.add_argument("--num_answers", type=int, default=8, help="answers in the figure")
    args = parser.parse_args()
    folder = args.dir
    evaluation = read_json(folder / "eval.json", "python eval.py --data_path … --output …")
    stages = {}
    if (folder / "stages.json").is_file():
        stages = read_json(folder / "stages.json", "scripts/run_stage.py")
    curves = read_curves(folder)
    if curves:
        draw_curves(curves, folder / "loss_curves.png")
    root = args.images_path or Path(evaluation["images_path"])
    chosen = choose_answers(evaluation["answers"], args.num_answers)
    draw_answers(chosen, root, evaluation["num_frames"], folder / "test_frames.png")

    measured = ("seconds", "cpu_seconds", "peak_memory_mb")
    report = {
        "accuracy": evaluation["accuracy"],
        "controls": evaluation["controls"],
        "clips": evaluation["clips"],
        "stages": {
            name: {key: stage[key] for key in measured}
            for name, stage in stages.items()
            if stage["returncode"] == 0  # not the stage that runs this very script
        },
        "parameters": evaluation["parameters"],
        "losses": {run: rows[-1] for run, rows in curves.items() if rows},
        "versions": {"python": platform.python_version()} | {p: version(p) for p in PACKAGES},
    }
    text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
    (folder / "report.json").write_text(text, encoding="utf-8")
    write_markdown(report, folder / "report.md")
    print(f"{folder}/report.md: {len(chosen)} answers shown, {len(stages)} stages")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"report.py: {error}") from None
