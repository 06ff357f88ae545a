"""Which summary learns most from the same computing time?

    python -m benchmarks.ablation_summary       # about 30 CPU-minutes
    python -m benchmarks.ablation_summary --budget 20 --seeds 1 --out out/ablation_short

Renders a small demo world, extracts its features once, then fine-tunes a fresh model for each
summary and seed with `train_sft.py` until the same number of CPU-seconds is spent, and scores it
with `eval.py` on unseen combinations and their reversed twins. A step of `concat` (all frames'
tokens go to the language model) costs several times one of the others, so it makes fewer: the cost
of a step is measured first, on a few steps of each kind. Writes `<out>/ablation.json` and prints a
table. Runs that are done are not repeated; another --budget needs another --out.
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from cli import Flags, flag, launch, parse_flags

SUMMARIES = ["dct", "mean", "concat", "gpt4video"]
TOWER = "demo/tower"
NUM_FRAMES = 8
CALIBRATION_STEPS, WARM_UP_STEPS = 40, 20  # the first steps pay for set-up


def run_script(command: str) -> None:
    subprocess.run([sys.executable, *command.split()], check=True)


def make_world(out: Path, clips: int) -> None:
    for split, number in (("train", clips), ("test", 150)):
        folder = out / split
        if not (folder / "questions.jsonl").exists():
            run_script(f"-m demo.world --split {split} --clips {number} --out {folder}")
    run_script(
        f"extract_features.py --data_path {out}/train/questions.jsonl --images_path {out}/train "
        f"--features_path {out}/features --vision_path {TOWER} --num_frames {NUM_FRAMES}"
    )


def train(out: Path, summary: str, seed: int, steps: int, name: str) -> list[dict]:
    """Fine-tune from random weights for `steps` optimizer steps; its lines of metrics."""
    if not (out / f"{name}.pth").exists():
        run_script(
            f"train_sft.py --from_scratch --summary {summary} --seed {seed} --out_dir {out} "
            f"--run_name {name} --data_path {out}/train/questions.jsonl --use_feature "
            f"--features_path {out}/features --num_frames {NUM_FRAMES} --embedding_std 0.1 "
            "--dim 128 --n_layers 2 --n_heads 4 --n_kv_heads 2 --optimizer muon "
            "--muon_learning_rate 0.015 --learning_rate 2e-3 --schedule linear --warmup_iters 20 "
            f"--batch_size 16 --epochs 1000 --max_steps {steps} --num_workers 0 --log_interval 10 "
            "--eval_interval 0 --save_interval 0"
        )
    return [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]


def score(out: Path, name: str) -> dict:
    """Accuracy on unseen combinations and their reversed twins."""
    scores = out / f"{name}.eval.json"
    if not scores.exists():
        run_script(
            f"eval.py --load_from {out}/{name}.pth --vision_path {TOWER} --output {scores} "
            f"--data_path {out}/test/questions.jsonl --images_path {out}/test"
        )
    return json.loads(scores.read_text())["accuracy"]


def step_cost(out: Path, summary: str) -> float:
    """CPU-seconds of one optimizer step, after the first ones."""
    lines = train(out, summary, 0, CALIBRATION_STEPS, f"{summary}-calibration")
    spent = {line["step"]: line["cpu_seconds"] for line in lines}
    return (spent[CALIBRATION_STEPS] - spent[WARM_UP_STEPS]) / (CALIBRATION_STEPS - WARM_UP_STEPS)


def print_table(table: dict[str, dict]) -> None:
    print("\n| summary | visual tokens | steps | CPU-s | all | reversed pairs | captions |")
    print("|---|---|---|---|---|---|---|")
    for summary, row in table.items():
        runs = row["runs"]
        cells = [summary, 50 * NUM_FRAMES if summary == "concat" else 50, runs[0]["step"]]
        cells.append(f"{statistics.mean(run['cpu_seconds'] for run in runs):.0f}")
        for key in ("all", "reversed", "captions"):
            values = [100 * run[key] for run in runs]
            spread = f" ({min(values):.1f}–{max(values):.1f})" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        print("| " + " | ".join(map(str, cells)) + " |")


@dataclass
class AblationFlags(Flags):
    """Ablation"""

    summaries: list[str] = flag(SUMMARIES, "summaries to compare", "--kinds")
    budget: float = flag(120, "CPU-seconds of training a run")
    seeds: int = flag(3, "runs of each summary", at_least=1)
    clips: int = flag(1500, "training clips of the small world", at_least=1)
    out: Path = flag(Path("out/ablation"), "folder for data, runs and ablation.json")


def main() -> None:
    flags = parse_flags(AblationFlags, __doc__)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # CPU-seconds then mean work, not waiting
    out = flags.out
    make_world(out, flags.clips)
    table = {
        summary: {"cpu_seconds_a_step": step_cost(out, summary), "runs": []}
        for summary in flags.summaries
    }
    # Seeds outside, summaries inside: what else the machine does meanwhile falls on all alike.
    for seed, summary in itertools.product(range(flags.seeds), flags.summaries):
        name = f"{summary}-{seed}"
        steps = round(flags.budget / table[summary]["cpu_seconds_a_step"])
        last = train(out, summary, seed, max(CALIBRATION_STEPS, steps), name)[-1]
        accuracy = score(out, name)
        run = {key: last[key] for key in ("step", "cpu_seconds", "loss")}
        run |= {key: accuracy[key] for key in ("all", "reversed", "captions")}
        table[summary]["runs"].append(run)
        (out / "ablation.json").write_text(json.dumps(table, indent=2) + "\n")
    print_table(table)


if __name__ == "__main__":
    launch(main)
