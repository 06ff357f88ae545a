"""Which summary learns most from the same computing time?

    python benchmarks/ablation_summary.py       # about 30 CPU-minutes
    python benchmarks/ablation_summary.py --budget 20 --seeds 1 --out out/ablation_short

Renders a small demo world, extracts its features once, then fine-tunes a fresh model for each
summary and seed with `train_sft.py` until the same number of CPU-seconds is spent, and scores it
with `eval.py` on unseen combinations and their reversed twins. A step of `concat` (all frames'
tokens go to the language model) costs several times one of the others, so it makes fewer: the cost
of a step is measured first, on a few steps of each kind. Writes `<out>/ablation.json` and prints a
table. Runs that are done are not repeated; another --budget needs another --out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

KINDS = ("dct", "mean", "concat", "gpt4video")
TOWER = "demo/tower"
NUM_FRAMES = 8
BATCH_SIZE = 16
CALIBRATION_STEPS, WARM_UP_STEPS = 40, 20  # the first steps pay for what is made once


def run(*command: str | Path) -> None:
    subprocess.run([sys.executable, *map(str, command)], check=True)


def make_world(out: Path, clips: int) -> None:
    for split, number in (("train", clips), ("test", 150)):
        folder = out / split
        if not (folder / "questions.jsonl").exists():
            world = ("--split", split, "--clips", str(number), "--out", folder)
            run("-m", "demo.world", *world)
    run(
        *("extract_features.py", "--data_path", out / "train/questions.jsonl"),
        *("--images_path", out / "train", "--features_path", out / "features"),
        *("--vision_path", TOWER, "--num_frames", str(NUM_FRAMES)),
    )


def train(out: Path, kind: str, seed: int, steps: int, name: str) -> list[dict]:
    """Fine-tune from random weights for `steps` updates; its lines of metrics."""
    if not (out / f"{name}.pth").exists():
        run(
            *("train_sft.py", "--from_scratch", "--summary", kind, "--seed", str(seed)),
            *("--out_dir", out, "--run_name", name, "--data_path", out / "train/questions.jsonl"),
            *("--use_feature", "--features_path", out / "features"),
            *("--num_frames", str(NUM_FRAMES), "--embedding_std", "0.1"),
            *("--dim", "128", "--n_layers", "2", "--n_heads", "4", "--n_kv_heads", "2"),
            *("--optimizer", "muon", "--muon_learning_rate", "0.015", "--learning_rate", "2e-3"),
            *("--schedule", "linear", "--warmup_iters", "20", "--batch_size", str(BATCH_SIZE)),
            *("--epochs", "1000", "--max_steps", str(steps), "--num_workers", "0"),
            *("--log_interval", "10", "--eval_interval", "0", "--save_interval", "0"),
        )
    return [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]


def score(out: Path, name: str) -> dict:
    """Accuracy on unseen combinations and their reversed twins."""
    scores = out / f"{name}.eval.json"
    if not scores.exists():
        run(
            *("eval.py", "--load_from", out / f"{name}.pth", "--vision_path", TOWER),
            *("--data_path", out / "test/questions.jsonl"),
            *("--images_path", out / "test", "--output", scores),
        )
    return json.loads(scores.read_text())["accuracy"]


def step_cost(out: Path, kind: str) -> float:
    """CPU-seconds of one update, once it runs evenly."""
    spent = {
        line["step"]: line["cpu_seconds"]
        for line in train(out, kind, 0, CALIBRATION_STEPS, f"{kind}-calibration")
    }
    return (spent[CALIBRATION_STEPS] - spent[WARM_UP_STEPS]) / (CALIBRATION_STEPS - WARM_UP_STEPS)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="summaries to try")
    parser.add_argument("--budget", type=float, default=120, help="CPU-seconds of training a run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--clips", type=int, default=1500, help="training clips of the small world")
    parser.add_argument("--out", type=Path, default=Path("out/ablation"))
    args = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # CPU-seconds then mean work, not waiting

    make_world(args.out, args.clips)
    table = {
        kind: {"cpu_seconds_a_step": step_cost(args.out, kind), "runs": []} for kind in args.kinds
    }
    # Seeds outside, kinds inside: what else the machine does meanwhile falls on all kinds alike.
    for seed, kind in itertools.product(range(args.seeds), args.kinds):
        name = f"{kind}-{seed}"
        steps = round(args.budget / table[kind]["cpu_seconds_a_step"])
        last = train(args.out, kind, seed, max(CALIBRATION_STEPS, steps), name)[-1]
        accuracy = score(args.out, name)
        table[kind]["runs"].append(
            {
                **{key: last[key] for key in ("step", "cpu_seconds", "loss")},
                **{key: accuracy[key] for key in ("all", "reversed", "captions")},
            }
        )
        (args.out / "ablation.json").write_text(json.dumps(table, indent=2) + "\n")

    tokens = {kind: 50 * NUM_FRAMES if kind == "concat" else 50 for kind in KINDS}
    print("\n| summary | visual tokens | steps | CPU-s | all | reversed pairs | captions |")
    print("|---|---|---|---|---|---|---|")
    for kind, row in table.items():
        cells = [kind, str(tokens[kind])]
        cells.append(str(row["runs"][0]["step"]))
        cells.append(f"{statistics.mean(r['cpu_seconds'] for r in row['runs']):.0f}")
        for key in ("all", "reversed", "captions"):
            values = [100 * r[key] for r in row["runs"]]
            spread = f" ({min(values):.1f}–{max(values):.1f})" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
