"""How much memory loading takes at most (`pytest -s` prints it; docs/checkpoints.md has the table).

A float32 model takes twice the bytes of a float16 file, so for such a file 2.0 is the least that
float32 can take; with dtype="auto" the model stays as the file is.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from model.config import LanguageModelConfig
from model.minimind import MiniMind

MEASURE = """
import os, sys
from pathlib import Path
import torch
from model.checkpoint import load_language_model

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

torch.set_num_threads(1)  # OpenMP's threads don't survive a fork: the child would wait for them
small, *paths = sys.argv[1:]
load_language_model(small, dtype="auto")  # for whatever is imported late
for path in paths:
    for dtype in (torch.float32, "auto"):
        if os.fork() == 0:  # a process whose peak is its own
            # Linux counts pages by CPU and adds up roughly: one that stays on one is exact.
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
            before = status("VmRSS")
            model = load_language_model(path, dtype=dtype)
            print(status("VmHWM") - before, flush=True)
            os._exit(0)
        os.wait()
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_loading_takes_at_most_half_more_than_the_file(tmp_path):
    paths, weights, config = [], [], LanguageModelConfig(hidden_size=512, num_hidden_layers=6)
    torch.save(MiniMind(LanguageModelConfig(64, 32, 1, 4, 2)).state_dict(), tmp_path / "small.pth")
    for dtype in (torch.float32, torch.float16):
        state = {n: weight.to(dtype) for n, weight in MiniMind(config).state_dict().items()}
        folder = tmp_path / str(dtype)
        folder.mkdir()
        torch.save(state, tmp_path / f"{dtype}.pth")
        save_file(state, folder / "model.safetensors")
        names = ("hidden_size", "num_attention_heads", "num_key_value_heads", "rope_theta")
        about = {"model_type": "llama", **{name: getattr(config, name) for name in names}}
        (folder / "config.json").write_text(json.dumps(about))
        weights += [tmp_path / f"{dtype}.pth", *[folder / "model.safetensors"] * 2]
        paths += [weights[-3], weights[-2], folder]
    # malloc takes every block over 64 KiB from the system and gives it back at once. By itself
    # glibc keeps some, as many as it has learned from what was freed before.
    rule = "glibc.malloc.mmap_threshold=65536:glibc.malloc.trim_threshold=65536"
    measured = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path / "small.pth", *paths],
        env=os.environ | {"GLIBC_TUNABLES": rule},
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
    )
    peaks = iter(map(int, measured.stdout.split()))
    for file in weights:
        for dtype in ("float32", "auto"):
            ratio = next(peaks, 0) / file.stat().st_size
            print(f"{file.relative_to(tmp_path)} dtype={dtype}: {ratio:.2f} times the file's size")
            least = 2 if "float16" in str(file) and dtype == "float32" else 1
            assert 0.98 * least < ratio < 1.5 * least, measured
