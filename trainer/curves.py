"""Pictures of the losses, drawn from metrics.jsonl: for the run while it trains, and for a report.

python -m trainer.curves out/sft_videolm_512 out/pretrain_videolm_512
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The lines of a jsonl that training wrote; a last one cut off by a kill is left out."""
    rows = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def draw_curves(curves: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """One field a run, losses over updates, as PNG; replaced at once, so a viewer never meets half
    a picture."""
    from matplotlib.figure import Figure  # slow to import; not pyplot: no window, no global state

    size = (5.5 * len(curves), 3.6)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(curves), squeeze=False)
    for axis, (run, rows) in zip(axes[0], curves.items(), strict=True):
        for key, style in (("loss", {"linewidth": 1}), ("val_loss", {"marker": "o"})):
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), label=key, **style)
        axis.set(title=run, xlabel="update", ylabel="loss a token")
        if axis.lines:
            axis.legend()
    temporary = path.with_name(f".{path.name}")
    try:
        figure.savefig(temporary, dpi=110, format="png")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the curves of runs beside each other.")
    parser.add_argument("runs", type=Path, nargs="+", help="folders with a metrics.jsonl")
    parser.add_argument("--output", type=Path, default=Path("curves.png"))
    args = parser.parse_args()
    draw_curves({run.name: read_rows(run / "metrics.jsonl") for run in args.runs}, args.output)
    print(args.output)


if __name__ == "__main__":
    main()
