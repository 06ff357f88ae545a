"""Runs one command as a named stage: measured, recorded, and not done twice.

    python scripts/run_stage.py --dir out/quickstart --name sft --makes out/quickstart/sft.pth \
        -- python train_sft.py …

`<dir>/stages.json` keeps for each stage its command, return code, seconds, CPU-seconds (children
included) and peak memory of the process tree. The same command is skipped once it has succeeded and
what it makes is there. A stage that was interrupted goes on where its command can resume. Once a
stage has to run, those after it are out of date: what they made is removed before they run again,
so that no training resumes on other data.
"""

import argparse
import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil

POLL_SECONDS = 0.5


def tree_memory(process: psutil.Process) -> int:
    """Bytes held by a process and its descendants; shared pages count once where the system says
    so (PSS), since loader workers share most of theirs with their parent."""
    total = 0
    try:
        tree = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for member in tree:
        try:
            info = member.memory_full_info()
            total += getattr(info, "pss", 0) or info.rss
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue  # ended between the listing and the look
        except psutil.AccessDenied:
            total += member.memory_info().rss
    return total


def run_measured(command: list[str]) -> dict:
    """Runs to the end, whatever the end is; the terminal's Ctrl-C reaches the command itself."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    child = subprocess.Popen(command)
    # Wait for the child's own end: it may be saving. Handlers, unlike SIG_IGN, aren't inherited.
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())

    peak, ended = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        try:
            process = psutil.Process(child.pid)
        except psutil.NoSuchProcess:
            return
        while not ended.wait(POLL_SECONDS):
            peak = max(peak, tree_memory(process))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    code = child.wait()
    ended.set()
    watcher.join()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # The system's own figure of the largest process catches a spike between two looks.
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "returncode": code if code >= 0 else 128 - code,
        "seconds": round(time.perf_counter() - start, 2),
        "cpu_seconds": round(
            after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 2
        ),
        "peak_memory_mb": round(max(peak, after.ru_maxrss * unit) / 2**20),
    }


def read_stages(path: Path) -> dict[str, dict]:
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error}); delete it to run every stage anew") from None


def write_stages(path: Path, stages: dict[str, dict]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(stages, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def remove(path: Path, root: Path) -> None:
    """Deletes an outdated result, and nothing outside of `root`."""
    if not path.resolve().is_relative_to(root.resolve()) or path.resolve() == root.resolve():
        raise ValueError(f"--makes {path} has to lie inside --dir {root}")
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def run_stage(root: Path, name: str, makes: list[Path], command: list[str]) -> int:
    root.mkdir(parents=True, exist_ok=True)
    file = root / "stages.json"
    stages = read_stages(file)
    past = stages.get(name)
    same = past is not None and past["command"] == command and not past["stale"]
    if same and past["returncode"] == 0 and all(path.exists() for path in makes):
        print(f"{name}: done before ({past['seconds']:.0f} s)")
        return 0

    resumed = same and past["returncode"] != 0
    if not same:
        for path in makes:
            remove(path, root)
    names = list(stages)
    for later in names[names.index(name) + 1 :] if name in stages else []:
        stages[later]["stale"] = True
    # Recorded before the start, so that even a power cut leaves an unfinished stage behind.
    earlier = past if resumed else {"seconds": 0, "cpu_seconds": 0, "peak_memory_mb": 0}
    measures = {key: earlier[key] for key in ("seconds", "cpu_seconds", "peak_memory_mb")}
    stages[name] = {"command": command, "returncode": None, "stale": False, **measures}
    write_stages(file, stages)

    result = run_measured(command)
    stages[name] |= {
        "returncode": result["returncode"],
        # A stage that was interrupted costs what all its attempts cost.
        "seconds": round(measures["seconds"] + result["seconds"], 2),
        "cpu_seconds": round(measures["cpu_seconds"] + result["cpu_seconds"], 2),
        "peak_memory_mb": max(measures["peak_memory_mb"], result["peak_memory_mb"]),
    }
    write_stages(file, stages)
    if result["returncode"] == 0:
        print(
            f"{name}: {result['seconds']:.0f} s, {result['cpu_seconds']:.0f} CPU-seconds, "
            f"at most {result['peak_memory_mb']} MB"
        )
    else:
        print(
            f"{name}: stopped with code {result['returncode']}: {shlex.join(command)}",
            file=sys.stderr,
        )
    return result["returncode"]


def main() -> int:
    parser = argparse.ArgumentParser(description="Run a command as a measured, resumable stage.")
    parser.add_argument("--dir", type=Path, required=True, help="where stages.json stands")
    parser.add_argument("--name", required=True)
    parser.add_argument("--makes", type=Path, nargs="*", default=[], help="what the stage makes")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- the command and its flags")
    args = parser.parse_args()
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        parser.error("no command after --")
    try:
        return run_stage(args.dir, args.name, args.makes, command)
    except (ValueError, OSError) as error:
        print(f"run_stage.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
