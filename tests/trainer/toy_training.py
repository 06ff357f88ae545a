"""A training of few seconds that tests start as a user would, and then disturb.

    python tests/trainer/toy_training.py --out_dir out --epochs 3
    FAULT=raise:1:4 torchrun --nproc_per_node 2 tests/trainer/toy_training.py --out_dir out

Engine, sampler, loader and processes are the real ones; the model is a matrix, so that nothing slow
has to be imported. FAULT=what:process:step happens in that process before that step, in its
first life: raise, kill (itself, by SIGKILL), term (SIGTERM to itself), hang (for ten
seconds), or full:bytes:… (no file may grow beyond these). Sample 7 is broken; DROPOUT changes what
is learnt.
"""

import os
import resource
import signal
import sys
import time
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import nn
from torch.utils.data import DataLoader

from cli import launch, parse_flags
from dataset.sampler import LengthGroupedBatchSampler
from trainer.config import TrainConfig
from trainer.distributed import is_restarted, setup
from trainer.engine import fit

SAMPLES, BROKEN = 24, 7


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        noise = nn.functional.dropout(x, float(os.environ.get("DROPOUT", "0.1")), self.training)
        return SimpleNamespace(loss=(self.layer(noise) - x.flip(-1)).square().sum())


class FaultyLoader(DataLoader):
    """Does what FAULT says when the batch of that step is fetched."""

    def __iter__(self):
        first = self.batch_sampler.skipped
        for step, batch in enumerate(super().__iter__(), first + 1):
            what, *limit, rank, at = os.environ.get("FAULT", "none:0:0").split(":")
            if (step, self.batch_sampler.rank) == (int(at), int(rank)) and not is_restarted():
                cause_fault(what, *map(int, limit))
            yield batch


def cause_fault(what: str, limit: int = 0) -> None:
    if what == "raise":
        raise RuntimeError("the disk is on fire")
    if what == "full":
        while not list(Path("out/run").glob("state-*.pt")):
            time.sleep(0.01)  # the thread that writes the first one may be late
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    elif what == "hang":
        time.sleep(10)
    else:
        os.kill(os.getpid(), signal.SIGKILL if what == "kill" else signal.SIGTERM)


def features(i: int) -> torch.Tensor:
    return torch.randn(8, generator=torch.Generator().manual_seed(i))


def collate(indices: list[int]) -> dict:
    good = [i for i in indices if i != BROKEN]
    bad = [{"id": f"s{i}", "path": f"{i}.mp4", "reason": "broken"} for i in indices if i == BROKEN]
    inputs = {"x": torch.stack([features(i) for i in good])} if good else {}
    batch = {"inputs": inputs, "sample_ids": [f"s{i}" for i in good], "bad": bad}
    return batch | dict.fromkeys(("supervised_tokens", "real_tokens", "padded_tokens"), len(good))


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    argv = [text.replace("{rank}", os.environ.get("RANK", "0")) for text in argv]
    defaults = {"batch_size": 2, "log_interval": 1, "save_interval": 2, "learning_rate": 0.01}
    defaults |= {"max_skipped_fraction": 0.5, "dtype": "float32", "device": "cpu", "num_workers": 0}
    config = parse_flags(TrainConfig, argv=argv, **defaults)
    torch.set_num_threads(1)
    with setup(config.device, config.timeout) as world:
        sampler = LengthGroupedBatchSampler(
            [1] * SAMPLES, config.batch_size, config.seed, world.rank, world.size
        )
        loader = FaultyLoader(range(SAMPLES), batch_sampler=sampler, collate_fn=collate)
        model = Toy()
        save = lambda path, meta: partial(torch.save, deepcopy(model.state_dict()), path)  # noqa: E731
        fit(model, loader, None, config, world, save, {"data": "toy"})


def run(argv: list[str] | None = None) -> None:
    launch(lambda: main(argv))


if __name__ == "__main__":
    run()
