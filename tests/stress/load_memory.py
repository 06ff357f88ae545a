"""How much memory loading takes at most, over the file's size:  python -m tests.stress.load_memory

Writes random checkpoints of full size, and loads each in a process of its own that has imported
everything before: the peak of its resident memory over what it had then. A float32 model takes
twice the bytes of a float16 file, so for such a file 2.0 is the least that float32 can take; with
dtype="auto" the model stays as the file is. Linux only (/proc).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from model.checkpoint import load_language_model, load_video_language_model
from model.cinego import Cinego
from model.config import CinegoConfig, LanguageModelConfig
from model.minimind import MiniMind


def write_checkpoints(root: Path, config: LanguageModelConfig, **whole) -> list[tuple]:
    """(loader, path, dtype to load) of every kind of file."""
    jobs = []
    for load, model in (
        ("language model", MiniMind(config)),
        ("whole model", Cinego(CinegoConfig(config, **whole))),
    ):
        for dtype in (torch.float32, torch.float16):
            state = {name: weight.to(dtype) for name, weight in model.state_dict().items()}
            stem = f"{load.split()[0]}_{str(dtype).removeprefix('torch.')}"
            paths = [root / f"{stem}.pth", root / f"{stem}.safetensors"]
            torch.save(state, paths[0])
            save_file(state, paths[1])
            if load == "language model":
                paths.append(root / f"{stem}_directory")
                paths[-1].mkdir()
                save_file(state, paths[-1] / "model.safetensors")
                names = ("hidden_size", "num_attention_heads", "num_key_value_heads")
                about = {name: getattr(config, name) for name in names}
                about |= {"model_type": "llama", "rope_theta": config.rope_theta}
                (paths[-1] / "config.json").write_text(json.dumps(about))
            for path in paths:
                jobs.append((load, str(path), "float32"))
                if dtype == torch.float16:
                    jobs.append((load, str(path), "auto"))
    return jobs


def peak_of_loading(load, path: Path, dtype) -> int:
    """Bytes, over those before; measured in a fork, whose peak is its own."""

    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

    read, write = os.pipe()
    if os.fork() == 0:
        # Linux counts pages by CPU and adds up roughly: a process that stays on one is exact.
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        before = status("VmRSS")
        model = load(path, dtype=dtype)
        os.write(write, str(status("VmHWM") - before).encode())
        os._exit(model is None)
    os.wait()
    os.close(write)
    with os.fdopen(read) as pipe:
        return int(pipe.read())


def fresh_process(jobs: list[tuple], **options) -> subprocess.CompletedProcess:
    """`measure(jobs)` in a process whose malloc takes every block over 64 KiB from the system and
    gives it back at once. By itself glibc keeps some, as many as it has learned from what was freed
    before: the same load then took 2.5 or 2.8 times the file's size, or hardly any memory at all.
    """
    rule = "glibc.malloc.mmap_threshold=65536:glibc.malloc.trim_threshold=65536"
    command = [sys.executable, "-m", "tests.stress.load_memory", "--measure", json.dumps(jobs)]
    return subprocess.run(command, env=os.environ | {"GLIBC_TUNABLES": rule}, **options)


def measure(jobs: list[tuple]) -> None:
    loaders = {"language model": load_language_model, "whole model": load_video_language_model}
    torch.set_num_threads(1)  # OpenMP's threads don't survive a fork: the child would wait for them
    with tempfile.TemporaryDirectory() as small:  # load one of each, for whatever is imported late
        warm_up = write_checkpoints(Path(small), LanguageModelConfig(64, 32, 1, 4, 2))
        for load, path, _ in warm_up:
            loaders[load](path)
    for load, path, dtype in jobs:
        path = Path(path)
        weights = path / "model.safetensors" if path.is_dir() else path
        size = weights.stat().st_size
        peak = peak_of_loading(loaders[load], path, torch.float32 if dtype == "float32" else dtype)
        print(
            f"{path.name:32} {load:15} dtype={dtype:8} file {size / 1e6:6.1f} MB  "
            f"peak {peak / 1e6:6.1f} MB  ratio {peak / size:.2f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--n_layers", type=int, default=8)
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # the second, fresh process
    args = parser.parse_args()
    if args.measure:
        return measure(json.loads(args.measure))
    with tempfile.TemporaryDirectory() as root:
        config = LanguageModelConfig(hidden_size=args.dim, num_hidden_layers=args.n_layers)
        jobs = write_checkpoints(Path(root), config)
        fresh_process(jobs, check=True)


if __name__ == "__main__":
    main()
