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

BLIND = ("no video", "first frame")  # controls in which no time can be seen
ROW = (
    "| {model} | {measure} | {bold}{score:.1f}{bold} | {low:.1f} to {high:.1f} | {floor:.1f} "
    "({floor_name}) | {n:,} | {missing:,} |"
)


@dataclass
class LeaderboardFlags(Flags):
    """Leaderboard"""

    files: list[str] = flag([], "eval.json of several runs; may also stand without --files")
    output: Path = flag(Path("out/leaderboard"), "name of the table and of the picture")

    def problems(self) -> list[str]:
        return super().problems() + ["name the eval.json of some runs"] * (not self.files)


def read_entries(path: Path) -> list[dict]:
    """The figures of ROW for each test set of a run, and `test_set`; scores in percent.

    Raises ValueError, with the fix, for a file that eval.py didn't write, or wrote before the
    figures had these names."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        entries = []
        for test_set, summary in result["benchmarks"].items():
            if measure := summary.get("headline"):
                row = summary["rows"][measure]
                blind = {name: row["controls"][name] for name in BLIND if name in row["controls"]}
                floors = row.get("floors", {}) | blind
                entries.append(_entry(test_set, measure, row, floors, summary["missing"]))
        if "interval" in result:
            floors = {"most frequent": result["accuracy"]["majority"]["all"]}
            if "no video" in result["controls"]:
                floors["no video"] = result["controls"]["no video"]["all"]
            data = ", ".join(Path(file).stem for file in result["data_path"])
            entries.append(_entry(data, "exact match", result["interval"], floors, 0))
        return [{"model": result["checkpoint"], **entry} for entry in entries]
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; eval.py --output writes it") from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: not what eval.py --output writes ({error!r}); run eval.py again: it reads "
            "the answers beside the file and asks only what is missing"
        ) from error


def _entry(test_set: str, measure: str, row: dict, floors: dict, missing: int) -> dict:
    floor, name = max(((100 * value, name) for name, value in floors.items()), default=(0.0, "-"))
    score, low, high = (100 * row[name] for name in ("score", "low", "high"))
    # Below its floors a score says nothing about video, however high it is.
    entry = {"test_set": test_set, "measure": measure, "bold": "**" if low > floor else ""}
    entry |= {"floor": floor, "floor_name": name, "n": row["n"], "missing": missing}
    return entry | {"score": score, "low": low, "high": high}


def as_markdown(entries: list[dict]) -> str:
    """A table for each test set."""
    lines = ["# Leaderboard", "", "In percent, with 95 % intervals clustered by video."]
    for test_set in dict.fromkeys(entry["test_set"] for entry in entries):
        lines += ["", f"## {test_set}", ""]
        lines += ["| model | measure | score | 95 % interval | highest floor | n | missing |"]
        lines += ["|---|---|---:|---:|---|---:|---:|"]
        lines += [ROW.format_map(entry) for entry in entries if entry["test_set"] == test_set]
    return "\n".join([*lines, "", "Bold: the whole interval lies above the highest floor.", ""])


def draw(entries: list[dict], path: Path) -> None:
    """A bar a score, with its interval and a mark at its highest floor."""
    figure = Figure(figsize=(8, 0.8 + 0.4 * len(entries)), layout="constrained")
    axis = figure.subplots()
    for place, entry in enumerate(reversed(entries)):
        score, floor = entry["score"], entry["floor"]
        error = [[score - entry["low"]], [entry["high"] - score]]
        axis.barh(place, score, xerr=error, height=0.6, color="tab:blue", capsize=3)
        axis.plot([floor, floor], [place - 0.4, place + 0.4], color="tab:red")
    labels = ["{test_set}: {model}".format_map(entry) for entry in reversed(entries)]
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
    entries.sort(key=lambda entry: (entry["test_set"], -entry["score"]))  # the best model first
    flags.output.parent.mkdir(parents=True, exist_ok=True)
    table, picture = (flags.output.with_suffix(suffix) for suffix in (".md", ".png"))
    table.write_text(as_markdown(entries), encoding="utf-8")
    draw(entries, picture)
    print(f"{as_markdown(entries)}\n{table} and {picture}")


if __name__ == "__main__":
    launch(main)
