"""Several models' figures side by side: a Markdown table and a picture.

    python -m scripts.leaderboard out/*/eval.json --output out/leaderboard

Reads what `eval.py --output` writes. A score stands with its 95 % interval and its floors: what
isn't above them was not read from the video. Writes `<output>.md` and `<output>.png`.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from cli import Flags, flag, launch, parse_flags


@dataclass
class LeaderboardFlags(Flags):
    """Leaderboard"""

    files: list[str] = flag([], "eval.json of several runs; may also stand without --files")
    output: Path = flag(Path("out/leaderboard"), "name of the table and of the picture")

    def problems(self) -> list[str]:
        return super().problems() + ["name the eval.json of some runs"] * (not self.files)


@dataclass
class Entry:
    """One model's figure on one test set, as fractions."""

    model: str
    test_set: str
    measure: str
    score: float
    low: float
    high: float
    n: int
    missing: int
    floors: dict[str, float]  # by name, the blank video among them


def read_entries(path: Path) -> list[Entry]:
    """Raises ValueError, with the fix, for a file that eval.py didn't write, or wrote before the
    figures had these names."""
    try:
        return _entries(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: not what eval.py --output writes ({error!r}); run eval.py again: it reads "
            "the answers beside the file and asks only what is missing"
        ) from error


def _entries(result: dict) -> list[Entry]:
    model, entries = str(result["checkpoint"]), []
    for test_set, summary in result["benchmarks"].items():
        if measure := summary.get("headline"):
            row, missing = summary["rows"][measure], summary["missing"]
            controls, without_order = row["controls"], ("no video", "first frame")
            blind = {name: controls[name] for name in without_order if name in controls}
            figures = (row["score"], row["low"], row["high"], row["n"], missing)
            entries.append(Entry(model, test_set, measure, *figures, row.get("floors", {}) | blind))
    if "interval" in result:
        found, controls = result["interval"], result["controls"]
        floors = {"most frequent": result["accuracy"]["majority"]["all"]}
        floors |= {"no video": controls["no video"]["all"]} if "no video" in controls else {}
        figures = (found["score"], found["low"], found["high"], found["n"], 0)
        data = ", ".join(Path(file).stem for file in result["data_path"])
        entries.append(Entry(model, data, "exact match", *figures, floors))
    return entries


def as_markdown(entries: list[Entry]) -> str:
    """A table for each test set, the best model first."""
    lines = ["# Leaderboard", "", "In percent, with 95 % intervals clustered by video."]
    for test_set in dict.fromkeys(entry.test_set for entry in entries):
        same = sorted((e for e in entries if e.test_set == test_set), key=lambda e: -e.score)
        lines += ["", f"## {test_set}", ""]
        lines += ["| model | measure | score | 95 % interval | highest floor | n | missing |"]
        lines += ["|---|---|---:|---:|---|---:|---:|"]
        for entry in same:
            name, floor = max(entry.floors.items(), key=lambda item: item[1], default=("-", 0.0))
            # Below its floors a score says nothing about video, however high it is.
            bold = "**" if entry.low > floor else ""
            lines.append(
                f"| {entry.model} | {entry.measure} | {bold}{100 * entry.score:.1f}{bold} "
                f"| {100 * entry.low:.1f} to {100 * entry.high:.1f} | {100 * floor:.1f} ({name}) "
                f"| {entry.n:,} | {entry.missing:,} |"
            )
    return "\n".join([*lines, "", "Bold: the whole interval lies above the highest floor.", ""])


def draw(entries: list[Entry], path: Path) -> None:
    """A bar a score, with its interval and a mark at its highest floor."""
    figure = Figure(figsize=(8, 0.8 + 0.4 * len(entries)), layout="constrained")
    axis = figure.subplots()
    entries = sorted(entries, key=lambda entry: (entry.test_set, -entry.score))[::-1]
    for place, entry in enumerate(entries):
        error = [[100 * (entry.score - entry.low)], [100 * (entry.high - entry.score)]]
        axis.barh(place, 100 * entry.score, xerr=error, height=0.6, color="tab:blue", capsize=3)
        if entry.floors:
            floor = 100 * max(entry.floors.values())
            axis.plot([floor, floor], [place - 0.4, place + 0.4], color="tab:red")
    labels = [f"{entry.test_set}: {entry.model}" for entry in entries]
    axis.set_yticks(range(len(entries)), labels, fontsize=8)
    axis.set_xlabel("percent; red: the highest floor")
    figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and not argv[0].startswith("-"):  # files by their names alone, as a shell expands them
        argv = ["--files", *argv]
    flags = parse_flags(LeaderboardFlags, __doc__, argv)
    entries = [entry for file in flags.files for entry in read_entries(Path(file))]
    if not entries:
        raise ValueError(f"{', '.join(flags.files)}: no score in them")
    flags.output.parent.mkdir(parents=True, exist_ok=True)
    table = flags.output.with_suffix(".md")
    table.write_text(as_markdown(entries), encoding="utf-8")
    draw(entries, flags.output.with_suffix(".png"))
    print(f"{as_markdown(entries)}\n{table} and {flags.output.with_suffix('.png')}")


if __name__ == "__main__":
    launch(main)
