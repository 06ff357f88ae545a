"""Kills a training by SIGKILL at random moments, and compares it with one that was left alone.

    python -m tests.stress.kills --kills 20      # over one run on 1, then over one on 2 processes

What runs is train_pretrain.py as a user starts it, with validation and checkpoints, on features
made up here, one file of them damaged. Of two processes one or both die; a survivor has to end by
itself. Then the same command starts again. Ends with an error unless weights and lines are those of
the undisturbed run.
"""

import argparse
import json
import random
import re
import tempfile
import time
from pathlib import Path

import torch

from cli import launch
from dataset.feature_store import FeatureStore
from tests.trainer.processes import finish, start
from trainer.logger import read_rows

TOKENIZER = Path(__file__).resolve().parents[2] / "model/text_tokenizer"
CLIPS, FRAMES, TOKENS, WIDTH = 40, 2, 5, 16
MEASURED = ("seconds", "cpu_seconds", "tokens_per_second", "data_wait")  # differ in any two runs


def make_data(folder: Path) -> None:
    """Captions of 40 clips with random features; clip 7 couldn't be decoded."""
    store = FeatureStore(folder / "features")
    size = {"tower": "made up", "tokens_per_frame": TOKENS, "hidden_size": WIDTH}
    store.begin({**size, "transform": {}, "num_frames": FRAMES, "sampling": "uniform"})
    lines = []
    for i in range(CLIPS):
        generator = torch.Generator().manual_seed(i)
        store.write(f"{i}.mp4", torch.randn(FRAMES, TOKENS, WIDTH, generator=generator))
        turns = [("human", "<video>\nwhat is it?"), ("gpt", f"thing {i}" + " moves" * (i % 5))]
        turns = [{"from": who, "value": text} for who, text in turns]
        lines.append(json.dumps({"id": f"s{i}", "video": f"{i}.mp4", "conversations": turns}))
    store.record("7.mp4", {"reason": "corrupt", "detail": "cut off"})
    store.finish()
    (folder / "data.jsonl").write_text("\n".join(lines))


def training_flags(folder: Path, out: str, processes: int, steps: int) -> list[str]:
    return (
        f"--out_dir {folder / out} --run_name run --device cpu --data_path {folder / 'data.jsonl'} "
        f"--val_path {folder / 'data.jsonl'} --use_feature --features_path {folder / 'features'} "
        f"--max_skipped_fraction 0.1 --tokenizer_path {TOKENIZER} "
        "--from_scratch --freeze_llm 0 --dim 32 --n_layers 1 --n_heads 2 --n_kv_heads 1 "
        f"--num_frames {FRAMES} --dtype float32 --learning_rate 1e-2 --num_workers 0 --timeout 60 "
        f"--batch_size {2 // processes} --epochs 1000 --max_steps {steps} --log_interval 1 "
        "--save_interval 3 --eval_interval 10"
    ).split()


def pretrain(argv: list[str]) -> None:
    import train_pretrain  # by the server of processes, and not by the one that kills

    torch.set_num_threads(1)
    launch(lambda: train_pretrain.main(argv))


def last_step(run: Path) -> int:
    return max((row["step"] for row in read_rows(run / "metrics.jsonl")), default=0)


def half_written(run: Path) -> list[Path]:
    """What a save that is under way has written so far: the weights or the state."""
    return [*run.parent.glob(".run.*"), *run.glob("state.tmp")]


def run_killed(folder: Path, processes: int, kills: int, steps: int, chance: random.Random) -> dict:
    """The run, killed so often and started again; how often each phase was hit."""
    out, log = f"killed{processes}", folder / f"killed{processes}.log"
    run, flags = folder / out / "run", training_flags(folder, out, processes, steps)
    hit = {"starting": 0, "training": 0, "saving": 0, "survivor_seconds": 0.0}
    log.touch()
    for number in range(kills):
        earlier = log.stat().st_size
        team = start(pretrain, flags, log, processes)
        # While it starts, some steps further on and somewhere within one, or in mid-write.
        moment = chance.choices(("starting", "training", "saving"), (1, 6, 3))[0]
        ahead, within = chance.randint(0, 5), chance.uniform(0, 0.01)
        begun = None
        while moment != "starting" and all(process.is_alive() for process in team):
            text = log.read_bytes()[earlier:].decode(errors="replace")
            begun = begun or re.search(rf"steps (\d+) to {steps}", text)
            if moment == "saving" and half_written(run):
                break
            if moment == "training" and begun and last_step(run) >= int(begun[1]) + ahead:
                break
            time.sleep(0.001)
        if moment != "saving":
            time.sleep(within if moment == "training" else 100 * within)
        assert all(p.is_alive() for p in team), f"it ended before kill {number + 1}, see {log}"
        victims = chance.choice([team, *([process] for process in team)])
        for process in victims:
            process.kill()
        killed = time.perf_counter()
        for process in team:
            process.join()
        if len(victims) < len(team):
            waited = time.perf_counter() - killed
            hit["survivor_seconds"] = max(hit["survivor_seconds"], waited)
        hit["saving" if half_written(run) else "training" if begun else "starting"] += 1
        for path in half_written(run):
            path.unlink()
    finish(start(pretrain, flags, log, processes), log)
    return hit


def compare(a: Path, b: Path) -> dict:
    """Two finished runs: the largest difference of a weight, and lines that are in one only."""
    weights = [torch.load(f"{folder}/run.pth", weights_only=True) for folder in (a, b)]
    assert weights[0].keys() == weights[1].keys()
    differences = [(weights[0][k] - weights[1][k]).abs().max().item() for k in weights[0]]
    lines = []
    for folder in (a, b):
        rows = read_rows(folder / "run/metrics.jsonl") + read_rows(folder / "run/quarantine.jsonl")
        kept = [{k: v for k, v in row.items() if k not in MEASURED} for row in rows]
        lines.append([json.dumps(row) for row in kept])
    lost = sum(line not in lines[1] for line in lines[0])
    more = len(lines[1]) - len(lines[0]) + lost
    return {"difference": max(differences), "lines": len(lines[0]), "lost": lost, "more": more}


def measure(folder: Path, processes: int, kills: int, steps: int, seed: int) -> dict:
    """Both runs and their comparison."""
    alone, log = f"alone{processes}", folder / f"alone{processes}.log"
    finish(start(pretrain, training_flags(folder, alone, processes, steps), log, processes), log)
    hit = run_killed(folder, processes, kills, steps, random.Random(seed))
    found = compare(folder / alone, folder / f"killed{processes}")
    return {"processes": processes, "kills": kills, "steps": steps, **hit, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    make_data(folder)
    for processes in args.processes:
        row = measure(folder, processes, args.kills, args.steps, args.seed)
        print(", ".join(f"{name} {value:.3g}" for name, value in row.items()), flush=True)
        if row["difference"] or row["lost"] or row["more"]:
            raise SystemExit(f"the runs differ; they stand in {folder}")


if __name__ == "__main__":
    main()
