"""Kills a training by SIGKILL at random moments, and compares it with one that was left alone.

    python tests/stress/kills.py --kills 20      # over one run on 1, then over one on 2 processes

What runs is train_pretrain.py as a user starts it, with validation and checkpoints, on features
made up here, one file of them damaged. Only the imports come from a server
that has done them before, so that the kills hit the training. Of two processes one or both die; a
survivor has to end by itself. Then the same command starts again. Ends with an error unless weights
and lines are those of the undisturbed run.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import socket
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from cli import launch
from dataset.feature_store import FeatureStore
from trainer.checkpoint import list_states, step_of
from trainer.logger import read_rows

TOKENIZER = Path(__file__).resolve().parents[2] / "model/text_tokenizer"
CLIPS, FRAMES, TOKENS, WIDTH = 40, 2, 5, 16
MEASURED = ("seconds", "cpu_seconds", "tokens_per_second", "data_wait")  # differ in any two runs
FORKSERVER = multiprocessing.get_context("forkserver")


def make_data(folder: Path) -> None:
    """Captions of 40 clips with random features; the file of clip 7 is cut off."""
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
    broken = store.path("7.mp4")
    broken.write_bytes(broken.read_bytes()[:100])
    store.finish({f"{i}.mp4": {} for i in range(CLIPS)}, {})
    (folder / "data.jsonl").write_text("\n".join(lines))


def command(folder: Path, out: str, processes: int, updates: int) -> list[str]:
    return [
        *("--out_dir", str(folder / out), "--run_name", "run", "--device", "cpu"),
        *("--data_path", str(folder / "data.jsonl"), "--val_path", str(folder / "data.jsonl")),
        *(
            "--use_feature",
            "--features_path",
            str(folder / "features"),
            "--max_skipped_fraction",
            "0.1",
        ),
        *("--tokenizer_path", str(TOKENIZER), "--from_scratch", "--freeze_llm", "0"),
        *("--dim", "32", "--n_layers", "1", "--n_heads", "2", "--n_kv_heads", "1"),
        *("--num_frames", str(FRAMES), "--dtype", "float32", "--learning_rate", "1e-2"),
        *("--batch_size", str(2 // processes), "--epochs", "1000", "--max_steps", str(updates)),
        *("--log_interval", "1", "--save_interval", "3", "--eval_interval", "10"),
        *("--num_workers", "0", "--timeout", "60"),
    ]


def pretrain(argv: list[str]) -> None:
    import train_pretrain  # by the server of processes, and not by the one that kills

    launch(lambda: train_pretrain.main(argv))


def start(main, arguments: list, log: Path, processes: int = 1, **environment: str) -> list:
    """`main(*arguments)` in so many processes that know each other."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    started = []
    for rank in range(processes):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        started.append(
            FORKSERVER.Process(target=_child, args=(main, arguments, log, environment | place))
        )
        started[-1].start()
    return started


def _child(main, arguments: list, log: Path, environment: dict[str, str]) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ |= environment
    # Its loader's processes come about as in any run, not from a server of their own.
    multiprocessing.set_start_method(None, force=True)
    torch.set_num_threads(1)
    sys.argv = ["train"]
    main(*arguments)


def half_written(run: Path) -> list[Path]:
    """What a save that is under way has written so far: the weights or the state."""
    return [*run.parent.glob(".run.*"), *run.glob("state.tmp")]


def last_update(run: Path) -> int:
    return max((row["step"] for row in read_rows(run / "metrics.jsonl")), default=0)


def run_killed(
    folder: Path, processes: int, kills: int, updates: int, chance: random.Random
) -> dict:
    """The run, killed so often and started again; what was hit, for the table."""
    out, log = f"killed{processes}", folder / f"killed{processes}.log"
    run, arguments = (
        folder / out / "run",
        [command(folder, f"killed{processes}", processes, updates)],
    )
    hit = {"starting": 0, "training": 0, "saving": 0, "repeated": 0, "survivor_seconds": 0.0}
    log.touch()
    for number in range(kills + 1):
        said = log.stat().st_size
        team = start(pretrain, arguments, log, processes)
        if number == kills:
            break
        # While it starts, some updates further on and somewhere within one, or in mid-write.
        moment = chance.choices(("starting", "training", "saving"), (1, 6, 3))[0]
        before = None
        if moment == "saving":
            while all(process.is_alive() for process in team) and not half_written(run):
                time.sleep(0.001)
            within = 0.0
        elif moment == "training":
            ahead, within = chance.randint(0, 5), chance.uniform(0, 0.01)
            while any(process.is_alive() for process in team):
                text = log.read_bytes()[said:].decode(errors="replace")
                if before is None and f" to {updates}" in text:
                    before = int(text.split(f" to {updates}")[0].rsplit("steps ")[-1])
                if before is not None and last_update(run) >= before + ahead:
                    break
                time.sleep(0.01)
        else:
            within = chance.uniform(0, 1)
        time.sleep(within)
        assert all(p.is_alive() for p in team), f"it ended before kill {number + 1}, see {log}"
        victims = chance.choice([team, *([process] for process in team)])
        for process in victims:
            process.kill()
        ended = time.perf_counter()
        for process in team:
            process.join()
        if len(victims) < len(team):
            hit["survivor_seconds"] = max(hit["survivor_seconds"], time.perf_counter() - ended)
        begun = f" to {updates}" in log.read_bytes()[said:].decode(errors="replace")
        hit["saving" if half_written(run) else "training" if begun else "starting"] += 1
        for path in half_written(run):
            path.unlink()
        newest = max((step_of(path) for path in list_states(run)), default=0)
        hit["repeated"] += max(0, last_update(run) - newest)
    for process in team:
        process.join()
        assert process.exitcode == 0, f"the last start failed, see {log}"
    return hit


def compare(a: Path, b: Path) -> dict:
    """Two finished runs: the largest difference of a weight, and lines that are in one only."""
    weights = [torch.load(f"{folder}/run.pth", weights_only=True) for folder in (a, b)]
    assert weights[0].keys() == weights[1].keys()
    differences = [(weights[0][k] - weights[1][k]).abs().max().item() for k in weights[0]]
    lines = []
    for folder in (a, b):
        rows = read_rows(folder / "run/metrics.jsonl")
        lines.append(
            [json.dumps({k: v for k, v in row.items() if k not in MEASURED}) for row in rows]
            + [json.dumps(row) for row in read_rows(folder / "run/quarantine.jsonl")]
        )
    lost = sum(line not in lines[1] for line in lines[0])
    more = len(lines[1]) - len(lines[0]) + lost
    return {"difference": max(differences), "lines": len(lines[0]), "lost": lost, "more": more}


def measure(folder: Path, processes: int, kills: int, updates: int, seed: int) -> dict:
    """Both runs and their comparison; AssertionError unless they are the same."""
    alone = start(
        pretrain,
        [command(folder, f"alone{processes}", processes, updates)],
        folder / f"alone{processes}.log",
        processes,
    )
    for process in alone:
        process.join()
        assert process.exitcode == 0, (folder / f"alone{processes}.log").read_text()[-2000:]
    hit = run_killed(folder, processes, kills, updates, random.Random(seed))
    found = compare(folder / f"alone{processes}", folder / f"killed{processes}")
    return {"processes": processes, "kills": kills, "updates": updates, **hit, **found}


def preload() -> None:
    """Has the server that the processes come from import everything once."""
    FORKSERVER.set_forkserver_preload(["torch", "transformers", "train_pretrain"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    preload()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())
    make_data(folder)
    columns = ("processes", "kills", "updates", "starting", "training", "saving", "repeated")
    columns += ("survivor_seconds", "difference", "lines", "lost", "more")
    print("| " + " | ".join(columns) + " |\n|" + "--:|" * len(columns))
    same = True
    for processes in args.processes:
        row = measure(folder, processes, args.kills, args.updates, args.seed)
        print("| " + " | ".join(f"{row[name]:.3g}" for name in columns) + " |", flush=True)
        same &= row["difference"] == row["lost"] == row["more"] == 0
    if not same:
        raise SystemExit(f"the runs differ; they stand in {folder}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
