"""Which summary learns most from the same computing time?

    python benchmarks/ablation_summary.py       # about 45 CPU-minutes
    python benchmarks/ablation_summary.py --budget 20 --seeds 1 --out out/ablation_short

Renders a small demo world, extracts its features once, then fine-tunes a fresh model for each
summary and seed with `train_sft.py` until the same number of CPU-seconds is spent, and scores it
with `eval.py` on unseen combinations and their reversed twins. A step of `concat` (all frames'
tokens go to the language model) costs several times one of the others, so it makes fewer: the cost
of a step is measured first, on a few steps of each kind. Under about 100 CPU-seconds nothing tells
forwards from backwards yet. Writes `<out>/ablation.json` and prints a table. Runs that are done are
not repeated; another --budget needs another --out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

KINDS = ("ours", "mean", "concat", "gpt4video")
TOWER = "model/vision_model/demo_tower"
NUM_FRAMES = 8
CALIBRATION_STEPS = 12


def run(*command: str | Path) -> None:
    subprocess.run([sys.executable, *map(str, command)], check=True)


def make_world(out: Path, clips: int) -> None:
    for split, number in (("train", clips), ("test", 150)):
        folder = out / split
        if not (folder / "questions.jsonl").exists():
            run(
                "-m",
                "dataset.demo_world",
                "--split",
                split,
                "--clips",
                str(number),
                "--out",
                folder,
            )
    run(
        *("extract_features.py", "--data_path", out / "train/questions.jsonl"),
        *("--images_path", out / "train", "--features_path", out / "features"),
        *("--vision_path", TOWER, "--num_frames", str(NUM_FRAMES)),
    )


def train(out: Path, kind: str, seed: int, steps: int, name: str) -> dict:
    """Fine-tune from random weights for `steps` updates; the last line of its metrics."""
    metrics = out / name / "metrics.jsonl"
    if not (out / f"{name}.pth").exists():
        run(
            *("train_sft.py", "--from_scratch", "--summary", kind, "--seed", str(seed)),
            *("--out_dir", out, "--run_name", name, "--data_path", out / "train/questions.jsonl"),
            *(
                "--use_feature",
                "--features_path",
                out / "features",
                "--num_frames",
                str(NUM_FRAMES),
            ),
            *("--dim", "128", "--n_layers", "3", "--n_heads", "4", "--embedding_std", "0.1"),
            *("--optimizer", "muon", "--muon_learning_rate", "0.015", "--learning_rate", "2e-3"),
            *("--schedule", "linear", "--warmup_iters", "10", "--batch_size", "32"),
            *("--epochs", "1000", "--max_steps", str(steps), "--num_workers", "0"),
            *("--log_interval", "10", "--eval_interval", "0", "--save_interval", "0"),
        )
    return json.loads(metrics.read_text().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="summaries to try")
    parser.add_argument("--budget", type=float, default=150, help="CPU-seconds of training a run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--clips", type=int, default=1500, help="training clips of the small world")
    parser.add_argument("--out", type=Path, default=Path("out/ablation"))
    args = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # CPU-seconds then mean work, not waiting

    make_world(args.out, args.clips)
    table = {}
    for kind in args.kinds:
        first = train(args.out, kind, 0, CALIBRATION_STEPS, f"{kind}-calibration")
        cost = first["cpu_seconds"] / CALIBRATION_STEPS
        steps = max(CALIBRATION_STEPS, round(args.budget / cost))
        runs = []
        for seed in range(args.seeds):
            name = f"{kind}-{seed}"
            last = train(args.out, kind, seed, steps, name)
            scores = args.out / f"{name}.eval.json"
            if not scores.exists():
                run(
                    *("eval.py", "--load_from", args.out / f"{name}.pth", "--vision_path", TOWER),
                    *("--data_path", args.out / "test/questions.jsonl"),
                    *("--images_path", args.out / "test", "--output", scores),
                )
            accuracy = json.loads(scores.read_text())["accuracy"]
            runs.append(
                {
                    "steps": last["step"],
                    "cpu_seconds": last["cpu_seconds"],
                    "loss": last["loss"],
                    **{key: accuracy[key] for key in ("all", "reversed", "captions")},
                }
            )
        table[kind] = {"cpu_seconds_a_step": cost, "runs": runs}
        (args.out / "ablation.json").write_text(json.dumps(table, indent=2) + "\n")

    tokens = {kind: 50 * NUM_FRAMES if kind == "concat" else 50 for kind in KINDS}
    print("\n| summary | visual tokens | steps | CPU-s | all | reversed pairs | captions |")
    print("|---|---|---|---|---|---|---|")
    for kind, row in table.items():
        cells = [kind, str(tokens[kind])]
        cells.append(str(row["runs"][0]["steps"]))
        cells.append(f"{statistics.mean(r['cpu_seconds'] for r in row['runs']):.0f}")
        for key in ("all", "reversed", "captions"):
            values = [100 * r[key] for r in row["runs"]]
            spread = f" ({min(values):.1f}–{max(values):.1f})" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
