"""A training of few seconds that tests start as a user would, and then harm.

    python tests/trainer/toy_training.py --out_dir out --epochs 3
    HARM=raise:1:4 torchrun --nproc_per_node 2 tests/trainer/toy_training.py --out_dir out

Engine, sampler, loader and processes are the real ones; the model is a matrix, so that nothing slow
has to be imported. HARM=what:process:update happens in that process before that update, in its
first life: raise, kill (itself, by SIGKILL), term (SIGTERM to itself), or full:bytes:… (no file may
grow beyond these). Sample 7 is broken; DROPOUT changes what is learnt.
"""

import os
import resource
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import nn
from torch.utils.data import DataLoader

from cli import launch, parse_flags
from dataset.video_dataset import LengthGroupedBatchSampler
from trainer.config import TrainConfig
from trainer.distributed import setup
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


class Harmed(DataLoader):
    """Does what HARM says when the batch of that update is fetched."""

    def __iter__(self):
        first = self.batch_sampler.skipped
        for i, batch in enumerate(super().__iter__(), first + 1):
            what, *where = os.environ.get("HARM", "none:0:0").split(":")
            reborn = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
            if not reborn and i == int(where[-1]) and int(where[-2]) == self.batch_sampler.rank:
                if what == "raise":
                    raise RuntimeError("the disk is on fire")
                if what == "full":
                    limit = int(where[0])
                    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
                else:
                    os.kill(os.getpid(), signal.SIGKILL if what == "kill" else signal.SIGTERM)
            yield batch


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
    defaults = {"batch_size": 2, "log_interval": 1, "save_interval": 2, "max_skipped_fraction": 0.5}
    defaults |= {"dtype": "float32", "device": "cpu", "num_workers": 0}
    config = parse_flags(TrainConfig, argv=argv, learning_rate=0.01, **defaults)
    torch.set_num_threads(1)
    with setup(config.device, config.timeout) as world:
        sampler = LengthGroupedBatchSampler(
            [1] * SAMPLES, config.batch_size, config.seed, world.rank, world.size
        )
        loader = Harmed(range(SAMPLES), batch_sampler=sampler, collate_fn=collate)
        model = Toy()
        fit(
            model,
            loader,
            None,
            config,
            world,
            lambda path, meta: torch.save(model.state_dict(), path),
            {"data": "toy"},
        )


def run(argv: list[str] | None = None) -> None:
    launch(lambda: main(argv))


if __name__ == "__main__":
    run()
